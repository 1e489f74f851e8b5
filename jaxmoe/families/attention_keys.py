"""Weight slices of an attention block: grouped-query attention, and latent attention (MLA)."""

from __future__ import annotations

from collections.abc import Iterator

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.weight_slice import ArrayIndex, WeightSlice, full_slice

_PATH = "attention"


def _halves(config: ModelConfig, first: int, head_dim: int) -> list[tuple[slice, slice]]:
    """Return (tensor slice, parameter slice) pairs of the head that begins at index `first`.

    Parameters store the two dims of a rotary pair half of the rotary dims apart. Checkpoints with interleaved RoPE
    store them next to each other, so their even and odd dims become separate slices.
    """
    dims = config.rotary_dims
    if not config.rope.interleaved:
        return [(slice(first, first + head_dim), slice(0, head_dim))]
    start = head_dim - dims if config.mla is not None else 0  # the first rotated dim
    slices = [(slice(first, first + start), slice(0, start))] if start else []
    for part in range(2):
        place = slice(start + part * dims // 2, start + (part + 1) * dims // 2)
        slices.append((slice(first + start + part, first + start + dims, 2), place))
    rest = start + dims
    return [*slices, (slice(first + rest, first + head_dim), slice(rest, head_dim))] if rest < head_dim else slices


def _query_heads(config: ModelConfig, sizes: ArraySizes) -> list[tuple[int, int, int]]:
    """Return (head, head slot, index within the slot) of every query head."""
    return [(head, *sizes.query_slot(config, head)) for head in range(config.num_attention_heads)]


def _out(config: ModelConfig, sizes: ArraySizes, hf: str, head_dim: int) -> Iterator[WeightSlice]:
    width, num_heads = config.hidden_size, config.num_attention_heads
    for head, slot, place in _query_heads(config, sizes):
        yield WeightSlice(
            key=f"{hf}.o_proj.weight", key_shape=(width, num_heads * head_dim),
            src=(slice(0, width), slice(head * head_dim, (head + 1) * head_dim)), path=f"{_PATH}/out",
            dst=(slot, place, slice(0, head_dim), slice(0, width)), transpose=True,
        )  # fmt: skip
    if config.out_bias:
        yield full_slice(f"{hf}.o_proj.bias", (width,), f"{_PATH}/out_bias")


def grouped_attention(config: ModelConfig, sizes: ArraySizes, hf: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of grouped-query attention.

    The qkv parameter holds the query heads of each head slot, then its key head, then its value head.
    """
    width, head_dim = config.hidden_size, config.head_dim
    num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads
    query = _query_heads(config, sizes)
    key_value = [(head, slot) for head in range(num_kv) for slot in sizes.key_value_slots(head)]
    places = {
        "q": (num_heads, query),
        "k": (num_kv, [(head, slot, sizes.group_slots) for head, slot in key_value]),
        "v": (num_kv, [(head, slot, sizes.group_slots + 1) for head, slot in key_value]),
    }
    for letter, (heads, slots) in places.items():
        key, shape = f"{hf}.{letter}_proj", (heads * head_dim, width)
        for head, slot, place in slots:
            first = head * head_dim
            whole_head = [(slice(first, first + head_dim), slice(0, head_dim))]
            for rows, dims in whole_head if letter == "v" else _halves(config, first, head_dim):
                yield WeightSlice(
                    key=f"{key}.weight", key_shape=shape, src=(rows, slice(0, width)), path=f"{_PATH}/qkv",
                    dst=(slice(0, width), slot, place, dims), transpose=True,
                )  # fmt: skip
                if config.qkv_bias:
                    yield WeightSlice(
                        key=f"{key}.bias", key_shape=shape[:1], src=(rows,), path=f"{_PATH}/qkv_bias",
                        dst=(slot, place, dims),
                    )  # fmt: skip
    yield from _out(config, sizes, hf, head_dim)
    yield from _norms_and_sinks(config, query, key_value, hf)


def _norms_and_sinks(
    config: ModelConfig, query: list[tuple[int, int, int]], key_value: list[tuple[int, int]], hf: str
) -> Iterator[WeightSlice]:
    head_dim = config.head_dim
    if config.sinks:
        for head, slot, place in query:
            dst: ArrayIndex = (slot, slice(place, place + 1))
            key_shape = (config.num_attention_heads,)
            yield WeightSlice(
                key=f"{hf}.sinks", key_shape=key_shape, src=(slice(head, head + 1),), path=f"{_PATH}/sinks", dst=dst
            )
    if config.qk_norm == "head":
        yield full_slice(f"{hf}.q_norm.weight", (head_dim,), f"{_PATH}/q_norm")
        yield full_slice(f"{hf}.k_norm.weight", (head_dim,), f"{_PATH}/k_norm")
    if config.qk_norm == "full":
        all_dims = slice(0, head_dim)
        for head, slot, place in query:
            yield WeightSlice(
                key=f"{hf}.q_norm.weight", key_shape=(config.num_attention_heads * head_dim,),
                src=(slice(head * head_dim, (head + 1) * head_dim),), path=f"{_PATH}/q_norm",
                dst=(slot, place, all_dims),
            )  # fmt: skip
        for head, slot in key_value:
            yield WeightSlice(
                key=f"{hf}.k_norm.weight", key_shape=(config.num_key_value_heads * head_dim,),
                src=(slice(head * head_dim, (head + 1) * head_dim),), path=f"{_PATH}/k_norm", dst=(slot, all_dims),
            )  # fmt: skip


def latent_attention(config: ModelConfig, sizes: ArraySizes, hf: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of latent attention.

    The down projections to the latents are whole; the up projections are split by query head.
    """
    mla = config.mla
    assert mla is not None
    width, rank, nope = config.hidden_size, mla.kv_lora_rank, mla.qk_nope_head_dim
    both, num_heads = nope + mla.v_head_dim, config.num_attention_heads
    down = (mla.cached_dim, width)
    for rows, columns in _halves(config, 0, mla.cached_dim):
        yield WeightSlice(
            key=f"{hf}.kv_a_proj_with_mqa.weight", key_shape=down, src=(rows, slice(0, width)), path=f"{_PATH}/kv_down",
            dst=(slice(0, width), columns), transpose=True,
        )  # fmt: skip
    yield full_slice(f"{hf}.kv_a_layernorm.weight", (rank,), f"{_PATH}/kv_norm")
    into, key = width, f"{hf}.q_proj.weight"
    if mla.q_lora_rank is not None:
        into, key = mla.q_lora_rank, f"{hf}.q_b_proj.weight"
        yield full_slice(f"{hf}.q_a_proj.weight", (into, width), f"{_PATH}/q_down", transpose=True)
        yield full_slice(f"{hf}.q_a_layernorm.weight", (into,), f"{_PATH}/q_norm")
    for head, slot, place in _query_heads(config, sizes):
        for rows, dims in _halves(config, head * config.head_dim, config.head_dim):
            yield WeightSlice(
                key=key, key_shape=(num_heads * config.head_dim, into), src=(rows, slice(0, into)), path=f"{_PATH}/q",
                dst=(slice(0, into), slot, place, dims), transpose=True,
            )  # fmt: skip
        keys, values = head * both, head * both + nope
        yield WeightSlice(
            key=f"{hf}.kv_b_proj.weight", key_shape=(num_heads * both, rank),
            src=(slice(keys, values), slice(0, rank)), path=f"{_PATH}/key_up",
            dst=(slot, place, slice(0, nope), slice(0, rank)),
        )  # fmt: skip
        yield WeightSlice(
            key=f"{hf}.kv_b_proj.weight", key_shape=(num_heads * both, rank),
            src=(slice(values, values + mla.v_head_dim), slice(0, rank)), path=f"{_PATH}/value_up",
            dst=(slot, place, slice(0, rank), slice(0, mla.v_head_dim)), transpose=True,
        )  # fmt: skip
    yield from _out(config, sizes, hf, mla.v_head_dim)
    yield from _indexer(config, into, f"{hf}.indexer")


def _indexer(config: ModelConfig, query_rank: int, hf: str) -> Iterator[WeightSlice]:
    if config.indexer is None:
        return
    heads, dim, width = config.indexer.num_heads, config.indexer.head_dim, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "wq_b.weight": (heads * dim, query_rank),
        "wk.weight": (dim, width),
        "weights_proj.weight": (heads, width),
    }
    shapes |= {"k_norm.weight": (dim,), "k_norm.bias": (dim,)}
    for name, shape in shapes.items():
        yield full_slice(f"{hf}.{name}", shape, f"{_PATH}/indexer/{name}")

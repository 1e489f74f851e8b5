"""Which tensor of a published checkpoint lies where in which parameter: one table, read by loading and by saving.

A Piece says: tensor `key`, of shape `key_shape`, taken at `src`, transposed or not, is the parameter `path` at `dst`.
Published matrices are [out, in]; parameters are [in, ...out].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.depth import Segment, place_of

Place = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One rectangle of a published tensor and where it goes.

    src: a (start, stop) for each of the tensor's dims. dst: for each dim of the parameter a fixed index or a slice with
    explicit bounds; its slices, in order, are the tensor's dims (in reverse order where transpose).
    """

    key: str
    key_shape: tuple[int, ...]
    src: tuple[tuple[int, int], ...]
    path: str
    dst: Place
    transpose: bool = False


@dataclass(frozen=True, kw_only=True)
class KeyNames:
    """The names in which families differ; {e} is the expert."""

    moe: str = "mlp"
    router: str = "gate"
    expert_gate: str = "experts.{e}.gate_proj"
    expert_up: str = "experts.{e}.up_proj"
    expert_down: str = "experts.{e}.down_proj"


def _whole(key: str, shape: tuple[int, ...], path: str, *, transpose: bool = False, dst: Place | None = None) -> Piece:
    placed = tuple(reversed(shape)) if transpose else shape
    place = tuple(slice(0, n) for n in placed) if dst is None else dst
    return Piece(key=key, key_shape=shape, src=tuple((0, n) for n in shape), path=path, dst=place, transpose=transpose)


def _attention(config: ModelConfig, sizes: ArraySizes, layer: int) -> Iterator[Piece]:
    hf, path = f"model.layers.{layer}.self_attn", "attention"
    width, head_dim = config.hidden_size, config.head_dim
    num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads

    def rows(head: int) -> tuple[int, int]:
        return head * head_dim, (head + 1) * head_dim

    all_width, all_dims = slice(0, width), slice(0, head_dim)
    query = [(head, *sizes.query_slot(config, head)) for head in range(num_heads)]
    key_value = [(head, slot) for head in range(num_kv) for slot in sizes.key_value_slots(head)]
    places = {
        "q": (num_heads, query),
        "k": (num_kv, [(head, slot, sizes.group_slots) for head, slot in key_value]),
        "v": (num_kv, [(head, slot, sizes.group_slots + 1) for head, slot in key_value]),
    }
    for letter, (heads, slots) in places.items():
        key, shape = f"{hf}.{letter}_proj", (heads * head_dim, width)
        for head, slot, place in slots:
            yield Piece(
                key=f"{key}.weight", key_shape=shape, src=(rows(head), (0, width)), path=f"{path}/qkv",
                dst=(all_width, slot, place, all_dims), transpose=True,
            )  # fmt: skip
            if config.qkv_bias:
                yield Piece(
                    key=f"{key}.bias", key_shape=shape[:1], src=(rows(head),), path=f"{path}/qkv_bias",
                    dst=(slot, place, all_dims),
                )  # fmt: skip
    for head, slot, place in query:
        yield Piece(
            key=f"{hf}.o_proj.weight", key_shape=(width, num_heads * head_dim), src=((0, width), rows(head)),
            path=f"{path}/out", dst=(slot, place, all_dims, all_width), transpose=True,
        )  # fmt: skip
    if config.out_bias:
        yield _whole(f"{hf}.o_proj.bias", (width,), f"{path}/out_bias")
    if config.qk_norm == "head":
        yield _whole(f"{hf}.q_norm.weight", (head_dim,), f"{path}/q_norm")
        yield _whole(f"{hf}.k_norm.weight", (head_dim,), f"{path}/k_norm")
    if config.qk_norm == "full":
        for head, slot, place in query:
            yield Piece(
                key=f"{hf}.q_norm.weight", key_shape=(num_heads * head_dim,), src=(rows(head),),
                path=f"{path}/q_norm", dst=(slot, place, all_dims),
            )  # fmt: skip
        for head, slot in key_value:
            yield Piece(
                key=f"{hf}.k_norm.weight", key_shape=(num_kv * head_dim,), src=(rows(head),),
                path=f"{path}/k_norm", dst=(slot, all_dims),
            )  # fmt: skip


def _gated(
    hf_keys: tuple[str, str, str], path: str, width: int, ffn: int, expert: int | None = None
) -> Iterator[Piece]:
    """Gate, up and down projections of one SwiGLU; expert gives the leading index where experts are stacked."""
    lead: Place = () if expert is None else (expert,)
    for part, key in enumerate(hf_keys[:2]):
        rows, columns = slice(0, width), slice(0, ffn)
        dst: Place = (rows, part, columns) if expert is None else (expert, part, rows, columns)
        yield _whole(f"{key}.weight", (ffn, width), f"{path}/gate_up", transpose=True, dst=dst)
    dst = (*lead, slice(0, ffn), slice(0, width))
    yield _whole(f"{hf_keys[2]}.weight", (width, ffn), f"{path}/down", transpose=True, dst=dst)


def _dense_mlp(config: ModelConfig, layer: int) -> Iterator[Piece]:
    hf, path = f"model.layers.{layer}.mlp", "mlp"
    width, ffn = config.hidden_size, config.intermediate_size
    keys = (f"{hf}.gate_proj", f"{hf}.up_proj", f"{hf}.down_proj")
    yield from _gated(keys, path, width, ffn)
    if config.mlp_bias:
        for part, key in enumerate(keys[:2]):
            yield _whole(f"{key}.bias", (ffn,), f"{path}/gate_up_bias", dst=(part, slice(0, ffn)))
        yield _whole(f"{keys[2]}.bias", (width,), f"{path}/down_bias")


def _moe(config: ModelConfig, names: KeyNames, layer: int) -> Iterator[Piece]:
    assert config.moe is not None
    hf, path = f"model.layers.{layer}.{names.moe}", "moe"
    width, moe = config.hidden_size, config.moe
    yield _whole(f"{hf}.{names.router}.weight", (moe.num_experts, width), f"{path}/router", transpose=True)
    for expert in range(moe.num_experts):
        parts = (names.expert_gate, names.expert_up, names.expert_down)
        gate, up, down = (f"{hf}.{part.format(e=expert)}" for part in parts)
        yield from _gated((gate, up, down), f"{path}/experts", width, moe.intermediate_size, expert)
    if moe.shared_intermediate_size:
        shared = f"{hf}.shared_expert"
        keys = (f"{shared}.gate_proj", f"{shared}.up_proj", f"{shared}.down_proj")
        yield from _gated(keys, f"{path}/shared", width, moe.shared_intermediate_size)
        yield _whole(f"{hf}.shared_expert_gate.weight", (1, width), f"{path}/shared_gate", transpose=True)


def _layer(config: ModelConfig, sizes: ArraySizes, names: KeyNames, layer: int) -> Iterator[Piece]:
    """The pieces of one layer, with paths and places inside its block."""
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _whole(f"model.layers.{layer}.{norm}.weight", (config.hidden_size,), norm)
    yield from _attention(config, sizes, layer)
    yield from _moe(config, names, layer) if config.moe_layers[layer] else _dense_mlp(config, layer)


def pieces(
    config: ModelConfig, sizes: Sequence[ArraySizes], names: KeyNames, segments: tuple[Segment, ...]
) -> Iterator[Piece]:
    """Every piece of a whole checkpoint, in the order of the layers. sizes: of the layers of each segment."""
    width, vocab = config.hidden_size, config.vocab_size
    yield _whole("model.embed_tokens.weight", (vocab, width), "embed")
    for layer in range(config.num_hidden_layers):
        place = place_of(layer, segments)
        for piece in _layer(config, sizes[place.segment], names, layer):
            yield replace(piece, path=f"{place.path}/{piece.path}", dst=(place.slot, *piece.dst))
    yield _whole("model.norm.weight", (width,), "final_norm")
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", (vocab, width), "head", transpose=True)


def may_stand_unused(key: str, config: ModelConfig) -> bool:
    """Tensors that published checkpoints carry and inference does not need: rotary tables, a tied head's copy."""
    return key.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and key == "lm_head.weight")

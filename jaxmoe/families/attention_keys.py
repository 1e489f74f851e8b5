"""Weight slices of an attention block: grouped-query attention, and latent attention (MLA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import ParameterDeclaration
from jaxmoe.weight_slice import WeightSlice


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


def _key_value_heads(config: ModelConfig, sizes: ArraySizes) -> list[tuple[int, int]]:
    """Return (head, head slot) of every replica of every key/value head."""
    return [(head, slot) for head in range(config.num_key_value_heads) for slot in sizes.key_value_slots(head)]


def attention_slices(
    declaration: ParameterDeclaration, config: ModelConfig, sizes: ArraySizes, fields: Mapping[str, str]
) -> Iterator[WeightSlice]:
    """Yield the weight slices of a parameter of an attention block whose tensors are not whole parameters.

    declaration: without padding. fields: of its key.
    """
    if declaration.stored == "projections":
        return _projections(declaration, config, sizes, fields)
    key = declaration.key.format_map(fields)
    if declaration.stored == "rotary":
        num_rows = declaration.dims["latent"]
        return (
            _rows(declaration, key, num_rows, rows, latent=columns) for rows, columns in _halves(config, 0, num_rows)
        )
    if "head_slot" not in declaration.dims:
        return _key_heads(declaration, config, sizes, key)
    return _query_heads_of(declaration, config, sizes, key)


def _rows(declaration: ParameterDeclaration, key: str, num_rows: int, rows: slice, **index: int | slice) -> WeightSlice:
    """Return the weight slice of some rows of a tensor with num_rows rows; its other dims are whole.

    index: where the rows are in the parameter: the slice of one dim that they fill, and fixed indices in other dims.
    """
    dst = {dim: index.get(dim, slice(0, size)) for dim, size in declaration.dims.items()}
    dims = [dim for dim, at in dst.items() if isinstance(at, slice)]
    if declaration.transposed:
        dims.reverse()
    return WeightSlice(
        key=key, key_shape=tuple(num_rows if dim in index else declaration.dims[dim] for dim in dims),
        src=tuple(rows if dim in index else dst[dim] for dim in dims), path=declaration.path, dst=tuple(dst.values()),
        transpose=declaration.transposed,
    )  # fmt: skip


def _projections(
    declaration: ParameterDeclaration, config: ModelConfig, sizes: ArraySizes, fields: Mapping[str, str]
) -> Iterator[WeightSlice]:
    """Yield the weight slices of q, k and v in one parameter.

    It holds the query heads of each head slot, then its key head, then its value head.
    """
    head_dim, num_kv = config.head_dim, config.num_key_value_heads
    key_value = _key_value_heads(config, sizes)
    places = {
        "q": (config.num_attention_heads, _query_heads(config, sizes)),
        "k": (num_kv, [(head, slot, sizes.group_slots) for head, slot in key_value]),
        "v": (num_kv, [(head, slot, sizes.group_slots + 1) for head, slot in key_value]),
    }
    for letter, (heads, slots) in places.items():
        key = declaration.key.format_map({**fields, "projection": letter})
        for head, slot, place in slots:
            first = head * head_dim
            whole_head = [(slice(first, first + head_dim), slice(0, head_dim))]
            for rows, dims in whole_head if letter == "v" else _halves(config, first, head_dim):
                yield _rows(declaration, key, heads * head_dim, rows, kv_head=slot, head_slot=place, head_dim=dims)


def _key_heads(
    declaration: ParameterDeclaration, config: ModelConfig, sizes: ArraySizes, key: str
) -> Iterator[WeightSlice]:
    """Yield the weight slices of a parameter with a row for each dim of each key head."""
    size, num_rows = config.head_dim, config.num_key_value_heads * config.head_dim
    for head, slot in _key_value_heads(config, sizes):
        rows = slice(head * size, (head + 1) * size)
        yield _rows(declaration, key, num_rows, rows, kv_head=slot, head_dim=slice(0, size))


def _query_heads_of(
    declaration: ParameterDeclaration, config: ModelConfig, sizes: ArraySizes, key: str
) -> Iterator[WeightSlice]:
    """Yield the weight slices of a parameter with rows for each query head.

    In kv_b_proj of latent attention, a head's rows for keys precede its rows for values.
    """
    size = declaration.dims.get("head_dim", 1)
    stride, offset = size, 0
    if config.mla is not None and declaration.stored in ("latent_keys", "latent_values"):
        stride = config.mla.qk_nope_head_dim + config.mla.v_head_dim
        offset = config.mla.qk_nope_head_dim if declaration.stored == "latent_values" else 0
    num_rows = config.num_attention_heads * stride
    for head, slot, place in _query_heads(config, sizes):
        first = head * stride + offset
        if "head_dim" not in declaration.dims:
            one_row = slice(first, first + 1)
            yield _rows(declaration, key, num_rows, one_row, kv_head=slot, head_slot=slice(place, place + 1))
            continue
        whole_head = [(slice(first, first + size), slice(0, size))]
        for rows, dims in _halves(config, first, size) if declaration.stored == "rotary_heads" else whole_head:
            yield _rows(declaration, key, num_rows, rows, kv_head=slot, head_slot=place, head_dim=dims)

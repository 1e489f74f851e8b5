"""Weight slices of the numbers and scales of quantized matrices, derived from the slices of unquantized matrices.

A checkpoint matrix here is [..., out, in]; its numbers may be packed along the inputs. Scales are read through a
ScaleView at the parameter's own blocks: each block gets the scale of the checkpoint block that contains it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from jaxmoe.quantization.formats import BlockAlignment, QuantizationFormat
from jaxmoe.weight_slice import ArrayIndex, WeightSlice


def is_matrix(weight_slice: WeightSlice) -> bool:
    """Return whether the tensor is a matrix, or contains one matrix per expert."""
    return len(weight_slice.cut) == 2 and not weight_slice.path.endswith("bias")


def oriented(weight_slice: WeightSlice) -> WeightSlice:
    """Return the weight slice of a matrix with its tensor in the order [..., out, in].

    Unquantized tensors that contain all experts are published as [..., in, out].
    """
    if weight_slice.lead is None or weight_slice.transpose:
        return weight_slice
    swapped = lambda dims: (*dims[:-2], dims[-1], dims[-2])  # noqa: E731
    return replace(
        weight_slice, key_shape=swapped(weight_slice.key_shape), src=swapped(weight_slice.src), transpose=True
    )


def _slice_dims(index: ArrayIndex) -> list[int]:
    return [dim for dim, at in enumerate(index) if isinstance(at, slice)]


def block_alignment(weight_slice: WeightSlice, format: QuantizationFormat) -> BlockAlignment:
    """Return the extents that blocks along inputs and outputs must divide for this weight slice."""
    weight_slice = oriented(weight_slice)
    src, (inputs, outputs) = weight_slice.src, _slice_dims(weight_slice.dst)

    def alignment(at: int | slice, dst: int | slice, block: int | None) -> int:
        assert isinstance(at, slice)
        assert isinstance(dst, slice)
        if block is None:
            return 0
        if (at.step or 1) != 1:
            return 1
        bounds = range(-(-(at.start + 1) // block) * block, at.stop, block)
        return math.gcd(at.start, dst.start, *(bound - at.start + dst.start for bound in bounds[:2]))

    return BlockAlignment(
        inputs=alignment(src[-1], weight_slice.dst[inputs], format.inputs),
        outputs=alignment(src[-2], weight_slice.dst[outputs], format.outputs),
    )


def combined_alignment(one: BlockAlignment, other: BlockAlignment) -> BlockAlignment:
    """Return the block alignment that satisfies both."""
    return BlockAlignment(inputs=math.gcd(one.inputs, other.inputs), outputs=math.gcd(one.outputs, other.outputs))


def number_slice(weight_slice: WeightSlice, format: QuantizationFormat) -> WeightSlice:
    """Return the weight slice of the stored numbers, in items that pack numbers along the inputs as the format does."""
    weight_slice = oriented(weight_slice)
    factor = format.packing_factor
    if factor == 1:
        return weight_slice
    inputs = weight_slice.src[-1]
    assert isinstance(inputs, slice)
    at = _slice_dims(weight_slice.dst)[0]
    dst_slice = weight_slice.dst[at]
    assert isinstance(dst_slice, slice)
    return replace(
        weight_slice,
        key_shape=(*weight_slice.key_shape[:-1], weight_slice.key_shape[-1] // factor),
        src=(*weight_slice.src[:-1], slice(inputs.start // factor, inputs.stop // factor)),
        dst=(
            *weight_slice.dst[:at],
            slice(dst_slice.start // factor, dst_slice.stop // factor),
            *weight_slice.dst[at + 1 :],
        ),
    )


def block_shape(numbers: Sequence[int], scales: Sequence[int]) -> tuple[int, ...]:
    """Return the extents of a parameter's blocks, in stored items, from the shapes of its numbers and scales."""
    return tuple(whole // count for whole, count in zip(numbers, scales, strict=True))


def matrix_block_shape(weight_slice: WeightSlice, blocks: Sequence[int]) -> tuple[int, int]:
    """Return the extents of a block along outputs and inputs, for an oriented weight slice of numbers.

    blocks: extents of the parameter's blocks.
    """
    inputs, outputs = _slice_dims(weight_slice.dst)
    return blocks[outputs], blocks[inputs]


def scale_slices(parts: Sequence[WeightSlice], blocks: Sequence[int]) -> Iterator[WeightSlice]:
    """Yield the weight slices of a parameter's scales, from the weight slices of its numbers.

    Each has the key of the numbers and reads from a ScaleView.
    """
    seen = set()
    for weight_slice in parts:
        high, wide = matrix_block_shape(weight_slice, blocks)
        dst = tuple(
            at // block if isinstance(at, int) else slice(at.start // block, -(-at.stop // block))
            for at, block in zip(weight_slice.dst, blocks, strict=True)
        )
        # Heads that share a scale over all inputs yield one weight slice.
        where = tuple(chain.from_iterable((at,) if isinstance(at, int) else (at.start, at.stop) for at in dst))
        if where in seen:
            continue
        seen.add(where)
        *first, rows, columns = weight_slice.src
        *lead, num_rows, num_columns = weight_slice.key_shape
        yield replace(
            weight_slice,
            key_shape=(*lead, -(-num_rows // high), -(-num_columns // wide)),
            src=(*first, _in_blocks(rows, high), _in_blocks(columns, wide)),
            dst=dst,
        )


def _in_blocks(at: int | slice, block: int) -> slice:
    assert isinstance(at, slice)
    assert block == 1 or ((at.step or 1) == 1 and at.start % block == 0), (at, block)
    return at if block == 1 else slice(at.start // block, -(-at.stop // block))

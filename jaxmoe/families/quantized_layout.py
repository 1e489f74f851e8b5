"""Pieces of numbers and of scales, from the pieces of the plain matrices that they stand for.

A published matrix here is [..., out, in]; its numbers may be packed along the inputs. Its scales are read at the
parameter's own blocks: a tensor of cells, each of which takes its value from the published block it lies in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from jaxmoe.families.weight_slice import Piece, Place
from jaxmoe.formats import BlockAlignment, QuantizationFormat


def is_matrix(piece: Piece) -> bool:
    """Whether the tensor is a matrix, or holds one of every expert."""
    return len(piece.cut) == 2 and not piece.path.endswith("bias")


def oriented(piece: Piece) -> Piece:
    """The same piece of a matrix, of a tensor that is [..., out, in]: those of all experts are published the other way
    round where they are plain."""
    if piece.lead is None or piece.transpose:
        return piece
    swapped = lambda dims: (*dims[:-2], dims[-1], dims[-2])  # noqa: E731
    return replace(piece, key_shape=swapped(piece.key_shape), src=swapped(piece.src), transpose=True)


def _slices(place: Place) -> list[int]:
    return [dim for dim, at in enumerate(place) if isinstance(at, slice)]


def block_alignment(piece: Piece, format: QuantizationFormat) -> BlockAlignment:
    """What blocks along inputs and outputs must divide for this piece alone."""
    piece = oriented(piece)
    src, (inputs, outputs) = piece.src, _slices(piece.dst)

    def alignment(at: int | slice, place: int | slice, block: int | None) -> int:
        assert isinstance(at, slice)
        assert isinstance(place, slice)
        if block is None:
            return 0
        if (at.step or 1) != 1:
            return 1
        bounds = range(-(-(at.start + 1) // block) * block, at.stop, block)
        return math.gcd(at.start, place.start, *(bound - at.start + place.start for bound in bounds[:2]))

    return BlockAlignment(
        inputs=alignment(src[-1], piece.dst[inputs], format.inputs),
        outputs=alignment(src[-2], piece.dst[outputs], format.outputs),
    )


def combined_alignment(one: BlockAlignment, other: BlockAlignment) -> BlockAlignment:
    """What holds for both."""
    return BlockAlignment(inputs=math.gcd(one.inputs, other.inputs), outputs=math.gcd(one.outputs, other.outputs))


def number_piece(piece: Piece, format: QuantizationFormat) -> Piece:
    """The piece of the numbers as they are stored: two halves of a byte along the inputs are one item."""
    piece = oriented(piece)
    factor = format.packing_factor
    if factor == 1:
        return piece
    inputs = piece.src[-1]
    assert isinstance(inputs, slice)
    at = _slices(piece.dst)[0]
    place = piece.dst[at]
    assert isinstance(place, slice)
    return replace(
        piece,
        key_shape=(*piece.key_shape[:-1], piece.key_shape[-1] // factor),
        src=(*piece.src[:-1], slice(inputs.start // factor, inputs.stop // factor)),
        dst=(*piece.dst[:at], slice(place.start // factor, place.stop // factor), *piece.dst[at + 1 :]),
    )


def block_shape(numbers: Sequence[int], scales: Sequence[int]) -> tuple[int, ...]:
    """The extents of a parameter's blocks, in items of its numbers, from the shapes of both."""
    return tuple(whole // count for whole, count in zip(numbers, scales, strict=True))


def matrix_block_shape(piece: Piece, blocks: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a cell, for an oriented piece of numbers of a parameter with such blocks."""
    inputs, outputs = _slices(piece.dst)
    return blocks[outputs], blocks[inputs]


def scale_pieces(parts: Sequence[Piece], blocks: Sequence[int]) -> Iterator[Piece]:
    """The pieces of a parameter's scales, from those of its numbers; each key is the numbers' own, of a tensor of
    cells."""
    seen = set()
    for piece in parts:
        high, wide = matrix_block_shape(piece, blocks)
        dst = tuple(
            at // block if isinstance(at, int) else slice(at.start // block, -(-at.stop // block))
            for at, block in zip(piece.dst, blocks, strict=True)
        )
        # Heads that share a scale for all their inputs give one piece.
        where = tuple(chain.from_iterable((at,) if isinstance(at, int) else (at.start, at.stop) for at in dst))
        if where in seen:
            continue
        seen.add(where)
        *first, rows, columns = piece.src
        *lead, num_rows, num_columns = piece.key_shape
        yield replace(
            piece,
            key_shape=(*lead, -(-num_rows // high), -(-num_columns // wide)),
            src=(*first, _in_blocks(rows, high), _in_blocks(columns, wide)),
            dst=dst,
        )


def _in_blocks(at: int | slice, block: int) -> slice:
    assert isinstance(at, slice)
    assert block == 1 or ((at.step or 1) == 1 and at.start % block == 0), (at, block)
    return at if block == 1 else slice(at.start // block, -(-at.stop // block))

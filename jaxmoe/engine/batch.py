"""What one step is told, as one array of numbers a rank: the bucket it runs in, and where in the array each part lies.

A bucket fixes the shapes of a step, and so which compiled program runs it. There are few of them.
"""

# Dims: r ranks of the batch, d decode rows, n blocks of prompt tokens, q tokens of a block, p pages of a row.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.scheduler import Chunk, Limits, StepPlan
from jaxmoe.engine.scheduler import Sequence as Running


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Shapes of a step of one rank: rows that decode, blocks of prompt tokens, tokens of a block, pages of a row."""

    rows: int
    blocks: int
    block_tokens: int
    pages: int

    @property
    def num_tokens(self) -> int:
        """Tokens a rank computes, padding included."""
        return self.rows + self.blocks * self.block_tokens

    @property
    def num_sampled(self) -> int:
        """Rows of logits a rank computes."""
        return self.rows + self.blocks

    def _parts(self) -> dict[str, tuple[int, ...]]:
        rows, blocks, sampled = self.rows, self.blocks, self.num_sampled
        return {
            "row_positions": (rows,),  # of the token each row reads, which the step before drew
            "row_counts": (rows,),  # 1 where the row decodes
            "block_tokens": (blocks, self.block_tokens),
            "block_positions": (blocks,),
            "block_counts": (blocks,),
            "block_slots": (blocks,),  # the row that the block's next token is drawn for; past the last for none
            "table": (sampled, self.pages),
            "top_k": (sampled,),
            "seed": (sampled,),
            "temperature": (sampled,),
            "top_p": (sampled,),
            "min_p": (sampled,),
        }

    @property
    def length(self) -> int:
        """Numbers of 32 bits a rank is told."""
        return sum(math.prod(shape) for shape in self._parts().values())

    def split(self, packed: Any) -> dict[str, Any]:
        """The parts of packed [r, length] by name, [r, ...] each: views of a NumPy array, slices of a JAX one."""
        parts, start = {}, 0
        for name, shape in self._parts().items():
            stop = start + math.prod(shape)
            parts[name] = packed[:, start:stop].reshape(packed.shape[0], *shape)
            start = stop
        return parts


FLOAT_PARTS = ("temperature", "top_p", "min_p")  # their bits are those of float32 numbers


def row_buckets(*, least: int, most: int) -> list[int]:
    """The numbers of rows that are computed: least, four times that and so on while well below `most`, and `most`."""
    sizes = []
    while least < most / 2:
        sizes.append(least)
        least *= 4
    return [*sizes, most]


def _block_buckets(limits: Limits) -> list[int]:
    """The numbers of prompt blocks that are computed: all a step may have, or a quarter."""
    most = limits.chunk_tokens // limits.block_tokens
    return sorted({max(1, most // 4), most})


def bucket_of(plan: StepPlan, limits: Limits, *, least_rows: int, pages: int) -> Bucket:
    """The bucket a plan runs in. Steps with prompts always have all rows, so that there are few programs."""
    size = limits.block_tokens
    blocks = 0
    for rank in range(limits.num_ranks):
        used = sum(-(-chunk.count // size) for chunk in plan.chunks if chunk.sequence.rank == rank)
        blocks = max(blocks, used)
    if blocks:
        blocks = next(n for n in _block_buckets(limits) if n >= blocks)
        rows = limits.rows
    else:
        used = max(sequence.slot + 1 for sequence in plan.decodes)
        rows = next(n for n in row_buckets(least=least_rows, most=limits.rows) if n >= used)
    return Bucket(rows=rows, blocks=blocks, block_tokens=size, pages=pages)


def all_buckets(limits: Limits, *, least_rows: int, pages: int) -> list[Bucket]:
    """Every bucket that bucket_of can give."""
    rows = row_buckets(least=least_rows, most=limits.rows)
    mixed = [(rows[-1], blocks) for blocks in _block_buckets(limits)]
    return [
        Bucket(rows=r, blocks=b, block_tokens=limits.block_tokens, pages=pages)
        for r, b in [*((r, 0) for r in rows), *mixed]
    ]


def pack(plan: StepPlan, bucket: Bucket, limits: Limits, params_of: Any) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """packed [r, length] int32, and for each of plan.sampled() its (rank, row of logits). params_of: by request id."""
    packed = np.zeros((limits.num_ranks, bucket.length), np.int32)
    parts = bucket.split(packed)
    floats = {name: parts[name].view(np.float32) for name in FLOAT_PARTS}
    parts["block_slots"][:] = limits.rows
    floats["top_p"][:] = 1.0

    def tell(rank: int, row: int, sequence: Running) -> None:
        parts["table"][rank, row, : len(sequence.pages)] = sequence.pages
        params: SamplingParams = params_of(sequence.request_id)
        parts["top_k"][rank, row] = params.top_k
        parts["seed"][rank, row] = np.uint32(params.seed).view(np.int32)
        for name in FLOAT_PARTS:
            floats[name][rank, row] = getattr(params, name)

    places = []
    for sequence in plan.decodes:
        rank, row = sequence.rank, sequence.slot
        parts["row_positions"][rank, row] = sequence.num_written - 1
        parts["row_counts"][rank, row] = 1
        tell(rank, row, sequence)
        places.append((rank, row))
    next_block = [0] * limits.num_ranks
    for chunk in plan.chunks:
        block = _pack_chunk(chunk, bucket, parts, next_block, tell)
        if chunk.last:
            parts["block_slots"][chunk.sequence.rank, block] = chunk.sequence.slot
            places.append((chunk.sequence.rank, bucket.rows + block))
    return packed, places


def _pack_chunk(chunk: Chunk, bucket: Bucket, parts: dict[str, Any], next_block: list[int], tell: Any) -> int:
    """Fill in the blocks of one chunk; the last one's index."""
    sequence, rank, size = chunk.sequence, chunk.sequence.rank, bucket.block_tokens
    ids: Sequence[int] = sequence.tokens[chunk.start : chunk.start + chunk.count]
    block = -1
    for first in range(0, chunk.count, size):
        part = ids[first : first + size]
        block = next_block[rank]
        next_block[rank] += 1
        parts["block_tokens"][rank, block, : len(part)] = part
        parts["block_positions"][rank, block] = chunk.start + first
        parts["block_counts"][rank, block] = len(part)
        tell(rank, bucket.rows + block, sequence)
    return block

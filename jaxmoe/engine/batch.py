"""What one step is told, as one array of numbers a rank: the bucket it runs in, and where in the array each part lies.

A bucket fixes the shapes of a step, and so which compiled program runs it. There are few of them.
"""

# Dims: r ranks of the batch, d rows, n blocks of prompt tokens, q tokens of a block, p pages of a row, l tokens with a
# bias.
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import MAX_BIAS_TOKEN_IDS, SamplingParams
from jaxmoe.engine.scheduler import PromptChunk, StepPlan
from jaxmoe.engine.scheduler import Sequence as Running

# What an engine takes where nobody says otherwise. Chunk: prompt tokens of a step and rank; decode_steps: tokens a
# request decodes in one step where no prompt waits.
PAGE_SIZE, BLOCK_TOKENS, CHUNK_TOKENS, MAX_DECODE_STEPS = 16, 32, 512, 4
_NOWHERE = -1


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Shapes of a step of one rank: sequence slots, blocks of prompt tokens, tokens of a block, pages of a sequence.

    A sequence slot holds one request: it decodes, or a token is sampled for it after the last block of its prompt.
    micro_batches: even parts of slots and of blocks, in their order, which pass the stages of a pipeline one by one.
    """

    seq_slots: int
    blocks: int
    block_tokens: int
    pages: int
    micro_batches: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens a rank computes, padding included."""
        return self.seq_slots + self.blocks * self.block_tokens

    def slot_token(self, slot: int) -> int:
        """Return the index of a slot's decoded token among those of its rank, which are ordered by micro-batch."""
        part, place = divmod(slot, self.seq_slots // self.micro_batches)
        return part * (self.num_tokens // self.micro_batches) + place

    def block_token(self, block: int, place: int) -> int:
        """Where a token of a block is among those of its rank."""
        part, block = divmod(block, self.blocks // self.micro_batches)
        start = part * (self.num_tokens // self.micro_batches) + self.seq_slots // self.micro_batches
        return start + block * self.block_tokens + place

    def _parts(self) -> dict[str, tuple[int, ...]]:
        per_slot, blocks = (self.seq_slots,), (self.blocks,)
        bias_token_ids = (self.seq_slots, MAX_BIAS_TOKEN_IDS)
        return {
            "positions": per_slot,  # of the token each row reads, which the step before drew; or of its prompt's last
            "query_lens": per_slot,  # tokens the row decodes, one a decode step; 0 where it does not
            "logits_indices": per_slot,  # which of the rank's tokens the row's next one follows; -1 where none is drawn
            "block_table": (self.seq_slots, self.pages),
            "block_tokens": (self.blocks, self.block_tokens),
            "block_seq_slots": blocks,
            "block_positions": blocks,
            "block_query_lens": blocks,
            "temperature": per_slot,
            "top_k": per_slot,
            "top_p": per_slot,
            "min_p": per_slot,
            "seed": per_slot,
            "seed_high": per_slot,
            "repetition": per_slot,
            "presence": per_slot,
            "frequency": per_slot,
            "prompt_length": per_slot,
            "num_stop_ids": per_slot,
            "min_tokens_until": per_slot,
            "bias_token_ids": bias_token_ids,
            "bias": bias_token_ids,
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


# Parts whose bits are those of float32 numbers.
FLOAT_PARTS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias")


@dataclass(frozen=True, kw_only=True)
class RequestMetadata:
    """What a step needs to know of one request beside its tokens. num_prompt: tokens of its prompt. ends: tokens that
    end it, which may not come before its min_tokens."""

    params: SamplingParams
    num_prompt: int
    ends: tuple[int, ...]
    seed: int


def whole_blocks(chunk_tokens: int, shares: int = 1) -> tuple[int, int]:
    """(chunk_tokens rounded up to whole blocks, tokens of a block: a multiple of `shares`)."""
    block_tokens = -(-min(BLOCK_TOKENS, chunk_tokens) // shares) * shares
    return -(-chunk_tokens // block_tokens) * block_tokens, block_tokens


def slot_buckets(*, least: int, most: int) -> list[int]:
    """The numbers of slots that are computed: least, four times that and so on while well below `most`, and `most`."""
    sizes = []
    while least < most / 2:
        sizes.append(least)
        least *= 4
    return [*sizes, most]


def _block_buckets(config: SchedulerConfig, stages: int) -> list[int]:
    """The numbers of prompt blocks that are computed: all a step may have, a quarter of them, and so on down to 4; at
    least one for every stage of a pipeline."""
    sizes = [config.chunk_tokens // config.block_tokens]
    while sizes[-1] > 4:
        sizes.append(max(4, sizes[-1] // 4))
    return sorted({-(-size // stages) * stages for size in sizes})


def _micro_batches(seq_slots: int, blocks: int, stages: int) -> Iterator[int]:
    """One a stage keeps decoding stages busy; steps with prompts may have up to four times that, so that fewer wait."""
    yield stages
    parts = 2 * stages
    while stages > 1 and blocks and parts <= 4 * stages and seq_slots % parts == 0 and blocks % parts == 0:
        yield parts
        parts *= 2


def bucket_of(
    plan: StepPlan, config: SchedulerConfig, *, min_seq_slots: int, pages: int, stages: int = 1, shares: int = 1,
    whole: int = 1
) -> Bucket:  # fmt: skip
    """The bucket a plan runs in. Steps with prompts always have all slots, so that there are few programs."""
    size = config.block_tokens
    blocks = 0
    for rank in range(config.num_ranks):
        used = sum(-(-chunk.count // size) for chunk in plan.chunks if chunk.sequence.rank == rank)
        blocks = max(blocks, used)
    if blocks:
        blocks = next(n for n in _block_buckets(config, stages) if n >= blocks)
        seq_slots = config.max_num_seqs
    else:
        used = max(decode.sequence.slot + 1 for decode in plan.decodes)
        seq_slots = next(n for n in slot_buckets(least=min_seq_slots, most=config.max_num_seqs) if n >= used)
    return bucket_with(
        seq_slots, blocks, block_tokens=size, pages=pages, stages=stages, shares=shares, whole=whole
    )  # fmt: skip


@cache  # asked before every step
def bucket_with(
    seq_slots: int, blocks: int, *, block_tokens: int, pages: int, stages: int, shares: int = 1, whole: int = 1
) -> Bucket:
    """The bucket of so many rows and blocks, both multiples of the stages of the pipeline; rows, and tokens of a block,
    also of the ranks that share out the tokens of a context. whole: of what the tokens of a micro-batch should be a
    multiple, so that they can be shared out between the regions of layers; a step with prompts has blocks added for
    that, or fewer micro-batches, whichever takes less time."""

    def tokens_waited(blocks: int, parts: int) -> float:
        """What a stage computes or waits for: each of the parts, and as many more as there are stages before it."""
        return (seq_slots + blocks * block_tokens) / parts * (parts + stages - 1)

    more = range(blocks, blocks + whole * stages, stages) if blocks else [0]
    choices = [(count, parts) for count in more for parts in _micro_batches(seq_slots // shares, count, stages)]
    even = [(count, parts) for count, parts in choices if (seq_slots + count * block_tokens) % (parts * whole) == 0]
    as_they_are = [choice for choice in choices if choice[0] == blocks]
    blocks, parts = min(even or as_they_are, key=lambda choice: tokens_waited(*choice))
    return Bucket(seq_slots=seq_slots, blocks=blocks, block_tokens=block_tokens, pages=pages, micro_batches=parts)


def all_buckets(
    config: SchedulerConfig, *, min_seq_slots: int, pages: int, stages: int = 1, shares: int = 1, whole: int = 1
) -> list[Bucket]:
    """Every bucket that bucket_of can give."""
    seq_slots = slot_buckets(least=min_seq_slots, most=config.max_num_seqs)
    mixed = [(seq_slots[-1], blocks) for blocks in _block_buckets(config, stages)]
    return [
        bucket_with(r, b, block_tokens=config.block_tokens, pages=pages, stages=stages, shares=shares, whole=whole)
        for r, b in [*((r, 0) for r in seq_slots), *mixed]
    ]


def pack(
    plan: StepPlan, bucket: Bucket, config: SchedulerConfig, metadata_of: Callable[[int], RequestMetadata]
) -> np.ndarray:
    """What every rank is told of the plan, [r, length] int32. metadata_of: of a request, by its id."""
    packed = np.zeros((config.num_ranks, bucket.length), np.int32)
    parts = bucket.split(packed)
    floats = {name: parts[name].view(np.float32) for name in FLOAT_PARTS}
    floats["top_p"][:] = floats["repetition"][:] = 1.0
    parts["logits_indices"][:] = _NOWHERE
    parts["bias_token_ids"][:] = np.iinfo(np.int32).max

    def write_request(sequence: Running) -> tuple[int, int]:
        """Fill in a row, whether it decodes or has blocks."""
        at = sequence.rank, sequence.slot
        parts["block_table"][at][: len(sequence.pages)] = sequence.pages
        parts["block_table"][at][: sequence.num_behind] = 0  # any page: what lies there is not read, or not used
        request = metadata_of(sequence.request_id)
        params = request.params
        high, low = divmod(request.seed % 2**64, 2**32)
        parts["seed"][at], parts["seed_high"][at] = np.array([low, high], np.uint32).view(np.int32)
        parts["top_k"][at], parts["prompt_length"][at] = params.top_k, request.num_prompt
        for name in ("temperature", "top_p", "min_p"):
            floats[name][at] = getattr(params, name)
        if params.adjusts_logits:
            for name in ("repetition", "presence", "frequency"):
                floats[name][at] = getattr(params, f"{name}_penalty")
            stop_ids = request.ends if params.min_tokens else ()
            bias_token_ids = [*stop_ids, *params.logit_bias]
            parts["bias_token_ids"][at][: len(bias_token_ids)] = bias_token_ids
            floats["bias"][at][len(stop_ids) : len(bias_token_ids)] = list(params.logit_bias.values())
            parts["num_stop_ids"][at] = len(stop_ids)
            parts["min_tokens_until"][at] = min(request.num_prompt + params.min_tokens, np.iinfo(np.int32).max)
        return at

    for decode in plan.decodes:
        at = write_request(decode.sequence)
        parts["positions"][at], parts["query_lens"][at] = decode.start, decode.count
        parts["logits_indices"][at] = bucket.slot_token(at[1])
    next_block = [0] * config.num_ranks
    for chunk in plan.chunks:
        at = write_request(chunk.sequence)
        last = _pack_chunk(chunk, bucket, parts, next_block)
        if chunk.last:
            parts["logits_indices"][at], parts["positions"][at] = last, chunk.start + chunk.count - 1
    return packed


def _pack_chunk(chunk: PromptChunk, bucket: Bucket, parts: dict[str, Any], next_block: list[int]) -> int:
    """Fill in the blocks of one chunk; where its last token is among those of its rank."""
    sequence, rank, size = chunk.sequence, chunk.sequence.rank, bucket.block_tokens
    ids: Sequence[int] = sequence.tokens[chunk.start : chunk.start + chunk.count]
    last = _NOWHERE
    for first in range(0, chunk.count, size):
        part = ids[first : first + size]
        block = next_block[rank]
        next_block[rank] += 1
        parts["block_tokens"][rank, block, : len(part)] = part
        parts["block_seq_slots"][rank, block] = sequence.slot
        parts["block_positions"][rank, block] = chunk.start + first
        parts["block_query_lens"][rank, block] = len(part)
        last = bucket.block_token(block, len(part) - 1)
    return last

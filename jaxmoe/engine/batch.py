"""Packing of the metadata of one step into one int32 array per rank, and the buckets that fix its shapes.

A bucket fixes the shapes of a step and with them the compiled program. There are few buckets.
"""

# Dims: r ranks of the batch, d rows, n prompt blocks, q tokens of a block, p pages of a row, l biased tokens,
# K = logits_per_slot, W words of a token bitmask.
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import MAX_BIAS_TOKEN_IDS, SamplingParams
from jaxmoe.engine.scheduler import PromptChunk, ScheduledSequence, StepPlan
from jaxmoe.errors import StepError

# Defaults of an engine. CHUNK_TOKENS: prompt tokens per step and rank. MAX_DECODE_STEPS: tokens that a request decodes
# in one step while no prompt waits.
BLOCK_TOKENS = 32
_NOWHERE = -1
# Returns the token bitmask [W] int32 (ops.sampling.SamplingArrays) of the token after the given ones; None allows all.
BitmaskSource = Callable[[Sequence[int]], np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class StepBucket:
    """Fix the shapes of one rank's step: sequence slots, prompt blocks, tokens of a block, pages of a sequence.

    A sequence slot holds one request, which decodes, or samples a token after the last block of its prompt.
    micro_batches: number of equal parts of slots and blocks, in order, that pass through the pipeline one by one.
    logits_per_slot: most tokens of a slot whose logits are computed and sampled. More than one needs prompt blocks, to
    which these tokens belong.
    """

    seq_slots: int
    blocks: int
    block_tokens: int
    pages: int
    micro_batches: int = 1
    logits_per_slot: int = 1

    @property
    def num_logits(self) -> int:
        """Return the number of tokens of a rank whose logits are computed, padding included."""
        return self.seq_slots * self.logits_per_slot

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that a rank computes, padding included."""
        return self.seq_slots + self.blocks * self.block_tokens

    def slot_token(self, slot: int) -> int:
        """Return the index of a slot's decoded token among the tokens of its rank, which are ordered by micro-batch."""
        part, place = divmod(slot, self.seq_slots // self.micro_batches)
        return part * (self.num_tokens // self.micro_batches) + place

    def block_token(self, block: int, place: int) -> int:
        """Return the index of the token at `place` in a block among the tokens of its rank."""
        part, block = divmod(block, self.blocks // self.micro_batches)
        start = part * (self.num_tokens // self.micro_batches) + self.seq_slots // self.micro_batches
        return start + block * self.block_tokens + place

    def bitmask_shape(self, num_ranks: int, vocab_size: int) -> tuple[int, int, int, int]:
        """Return the shape [r, d, K, W] of the token bitmasks of a step."""
        return num_ranks, self.seq_slots, self.logits_per_slot, -(-vocab_size // 32)

    def _parts(self) -> dict[str, tuple[int, ...]]:
        per_slot, blocks = (self.seq_slots,), (self.blocks,)
        bias_token_ids = (self.seq_slots, MAX_BIAS_TOKEN_IDS)
        return {
            "positions": per_slot,  # of the token each row reads: the last sampled one, or the last of its prompt
            "query_lens": per_slot,  # tokens that the row decodes, one per decode step; 0 if it does not decode
            # indices of the tokens whose logits the row samples: the last ones that it reads, in order, and then -1
            "logits_indices": (self.seq_slots, self.logits_per_slot),
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
        """Return the length of the packed array of a rank, in 32-bit numbers."""
        return sum(math.prod(shape) for shape in self._parts().values())

    def split(self, packed: Any) -> dict[str, Any]:
        """Split packed [r, length] into its parts by name, [r, ...] each: NumPy views, or slices of a JAX array."""
        parts, start = {}, 0
        for name, shape in self._parts().items():
            stop = start + math.prod(shape)
            parts[name] = packed[:, start:stop].reshape(packed.shape[0], *shape)
            start = stop
        return parts


# Parts that hold the bits of float32 numbers.
FLOAT_PARTS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias")


@dataclass(frozen=True, kw_only=True)
class RequestMetadata:
    """Hold the metadata that a step needs of one request in addition to its tokens.

    num_prompt: tokens of its prompt. ends: end and stop tokens, which are masked before its min_tokens. token_bitmask:
    called with all tokens so far for every token that is to be sampled. If it raises, the requests of the step fail.
    """

    params: SamplingParams
    num_prompt: int
    ends: tuple[int, ...]
    seed: int
    token_bitmask: BitmaskSource | None = None


def whole_blocks(chunk_tokens: int, shares: int = 1) -> tuple[int, int]:
    """Return chunk_tokens rounded up to whole blocks, and the tokens of a block, a multiple of `shares`."""
    block_tokens = -(-min(BLOCK_TOKENS, chunk_tokens) // shares) * shares
    return -(-chunk_tokens // block_tokens) * block_tokens, block_tokens


def slot_buckets(*, least: int, most: int) -> list[int]:
    """Return the slot counts to compile: least, multiplied by four repeatedly while below most / 2, and `most`."""
    sizes = []
    while least < most / 2:
        sizes.append(least)
        least *= 4
    return [*sizes, most]


def _block_buckets(config: SchedulerConfig, stages: int) -> list[int]:
    """Return the prompt block counts to compile: the maximum, a quarter of it, and so on down to 4.

    Each is rounded up to a multiple of the pipeline stages.
    """
    sizes = [config.chunk_tokens // config.block_tokens]
    while sizes[-1] > 4:
        sizes.append(max(4, sizes[-1] // 4))
    return sorted({-(-size // stages) * stages for size in sizes})


def _micro_batches(seq_slots: int, blocks: int, stages: int) -> Iterator[int]:
    """Yield the possible numbers of micro-batches: one per stage, and two or four per stage in steps with prompts.

    One per stage keeps all stages busy while decoding. More of them shorten the bubbles of a step with prompts.
    """
    yield stages
    parts = 2 * stages
    while stages > 1 and blocks and parts <= 4 * stages and seq_slots % parts == 0 and blocks % parts == 0:
        yield parts
        parts *= 2


def bucket_of(
    plan: StepPlan, config: SchedulerConfig, *, min_seq_slots: int, pages: int, stages: int = 1, shares: int = 1,
    whole: int = 1
) -> StepBucket:  # fmt: skip
    """Return the bucket of a plan. Steps with prompts always have all slots, so that few programs are compiled."""
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
        seq_slots, blocks, block_tokens=size, pages=pages, stages=stages, shares=shares, whole=whole,
        logits_per_slot=max((chunk.num_sampled for chunk in plan.chunks if chunk.last), default=1),
    )  # fmt: skip


@cache  # called before every step
def bucket_with(
    seq_slots: int, blocks: int, *, block_tokens: int, pages: int, stages: int, shares: int = 1, whole: int = 1,
    logits_per_slot: int = 1,
) -> StepBucket:  # fmt: skip
    """Return the bucket of seq_slots slots and `blocks` prompt blocks, both multiples of the pipeline stages.

    shares: context-parallel ranks; seq_slots and block_tokens must be multiples of them. whole: desired alignment of
    the tokens of a micro-batch, so that sequence parallelism can shard them. To reach it, a step with prompts gets more
    blocks or fewer micro-batches, whichever is estimated to be faster.
    """

    def tokens_waited(blocks: int, parts: int) -> float:
        """Return the time of a pipelined step in tokens: micro-batch size times (micro-batches + stages - 1)."""
        return (seq_slots + blocks * block_tokens) / parts * (parts + stages - 1)

    more = range(blocks, blocks + whole * stages, stages) if blocks else [0]
    choices = [(count, parts) for count in more for parts in _micro_batches(seq_slots // shares, count, stages)]
    even = [(count, parts) for count, parts in choices if (seq_slots + count * block_tokens) % (parts * whole) == 0]
    as_they_are = [choice for choice in choices if choice[0] == blocks]
    blocks, parts = min(even or as_they_are, key=lambda choice: tokens_waited(*choice))
    return StepBucket(
        seq_slots=seq_slots, blocks=blocks, block_tokens=block_tokens, pages=pages, micro_batches=parts,
        logits_per_slot=logits_per_slot,
    )  # fmt: skip


def all_buckets(
    config: SchedulerConfig, *, min_seq_slots: int, pages: int, stages: int = 1, shares: int = 1, whole: int = 1
) -> list[StepBucket]:
    """Return every bucket that bucket_of can return."""
    seq_slots = slot_buckets(least=min_seq_slots, most=config.max_num_seqs)
    mixed = [(seq_slots[-1], blocks) for blocks in _block_buckets(config, stages)]
    return [
        bucket_with(r, b, block_tokens=config.block_tokens, pages=pages, stages=stages, shares=shares, whole=whole)
        for r, b in [*((r, 0) for r in seq_slots), *mixed]
    ]


def pack(
    plan: StepPlan, bucket: StepBucket, config: SchedulerConfig, metadata_of: Callable[[int], RequestMetadata]
) -> np.ndarray:
    """Pack the metadata of a plan for every rank: [r, length] int32. metadata_of: metadata of a request by its id."""
    packed = np.zeros((config.num_ranks, bucket.length), np.int32)
    parts = bucket.split(packed)
    floats = {name: parts[name].view(np.float32) for name in FLOAT_PARTS}
    floats["top_p"][:] = floats["repetition"][:] = 1.0
    parts["logits_indices"][:] = _NOWHERE
    parts["bias_token_ids"][:] = np.iinfo(np.int32).max

    def write_request(sequence: ScheduledSequence) -> tuple[int, int]:
        """Write the row of a sequence that decodes or has prompt blocks, and return its rank and slot."""
        at = sequence.rank, sequence.slot
        parts["block_table"][at][: len(sequence.pages)] = sequence.pages
        parts["block_table"][at][: sequence.num_behind] = 0  # any page: attention ignores its contents
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
        parts["logits_indices"][at][0] = bucket.slot_token(at[1])
    next_block = [0] * config.num_ranks
    for chunk in plan.chunks:
        at = write_request(chunk.sequence)
        first_block = next_block[chunk.sequence.rank]
        _pack_chunk(chunk, bucket, parts, next_block)
        if chunk.last:
            sampled = (divmod(place, bucket.block_tokens) for place in range(chunk.count)[-chunk.num_sampled :])
            indices = [bucket.block_token(first_block + block, place) for block, place in sampled]
            parts["logits_indices"][at][: len(indices)] = indices
            parts["positions"][at] = chunk.start + chunk.count - 1
    return packed


def pack_bitmasks(
    plan: StepPlan, bucket: StepBucket, config: SchedulerConfig, metadata_of: Callable[[int], RequestMetadata],
    *, vocab_size: int,
) -> np.ndarray | None:  # fmt: skip
    """Pack the token bitmasks of a plan for every rank: [r, d, K, W] int32. None if every token may be sampled.

    A row with a token bitmask must decode one token (ScheduledSequence.awaits_tokens). Raises: StepError if a bitmask
    has another shape or dtype.
    """
    sampled = [(decode.sequence, range(decode.start, decode.start + 1)) for decode in plan.decodes]
    sampled += [
        (chunk.sequence, range(chunk.start, chunk.start + chunk.count)[-chunk.num_sampled :])
        for chunk in plan.chunks if chunk.last
    ]  # fmt: skip
    shape, bitmasks = bucket.bitmask_shape(config.num_ranks, vocab_size), {}
    for sequence, positions in sampled:
        token_bitmask = metadata_of(sequence.request_id).token_bitmask
        for index, position in enumerate(positions if token_bitmask is not None else ()):
            bitmask = token_bitmask(sequence.tokens[: position + 1])
            if bitmask is None:
                continue
            if bitmask.shape != shape[-1:] or bitmask.dtype != np.int32:
                kind = f"{bitmask.dtype} of shape {bitmask.shape}"
                raise StepError(f"a token bitmask is {kind}, it must be int32 of shape {shape[-1:]}")
            bitmasks[sequence.rank, sequence.slot, index] = bitmask
    if not bitmasks:
        return None
    packed = np.full(shape, -1, np.int32)
    for at, bitmask in bitmasks.items():
        packed[at] = bitmask
    return packed


def _pack_chunk(chunk: PromptChunk, bucket: StepBucket, parts: dict[str, Any], next_block: list[int]) -> None:
    """Write the blocks of one prompt chunk from next_block of its rank on."""
    sequence, rank, size = chunk.sequence, chunk.sequence.rank, bucket.block_tokens
    ids: Sequence[int] = sequence.tokens[chunk.start : chunk.start + chunk.count]
    for first in range(0, chunk.count, size):
        part = ids[first : first + size]
        block = next_block[rank]
        next_block[rank] += 1
        parts["block_tokens"][rank, block, : len(part)] = part
        parts["block_seq_slots"][rank, block] = sequence.slot
        parts["block_positions"][rank, block] = chunk.start + first
        parts["block_query_lens"][rank, block] = len(part)

"""The collectives one step holds under a layout: which, over which axes, how many, how many bytes.

Source: docs/architecture.md, "Communication is a contract"; byte counts of rings as in the Megatron-LM papers.
"""

# Dims: t tokens of this device, D width, E experts (padded), N ranks of an axis.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ModelConfig
from jaxmoe.depth import Schedule, segments
from jaxmoe.sharding import Placement, array_sizes

Op = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective: op over mesh axes, with result_bytes on each device."""

    op: Op
    axes: tuple[str, ...]
    result_bytes: int

    def sent_bytes(self, num_ranks: int) -> float:
        """Bytes one device sends: ring for all-reduce, directly for the others."""
        share = (num_ranks - 1) / num_ranks
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": num_ranks - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }
        return factor[self.op] * self.result_bytes


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What decides a step's traffic: of one rank of the batch, tokens and rows of logits, padding included.

    micro_batches: even parts in which they pass the stages of a pipeline. itemsize: bytes of a number of the
    activations.
    """

    num_tokens: int
    num_sampled: int
    itemsize: int
    micro_batches: int = 1


def planned_collectives(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[Collective]:
    """Every collective of one step of one turn, and how often it runs."""
    beside = placement.seen("beside")
    schedule = Schedule(stages=placement.num_stages, chunks=placement.chunks, micro_batches=shape.micro_batches)
    ticks = schedule.ticks()
    parts = segments(config, "scan", stages=placement.num_stages, chunks=placement.chunks)
    tokens = shape.num_tokens // shape.micro_batches
    hidden = config.hidden_size * shape.itemsize
    found: Counter[Collective] = Counter()

    def add(place: Placement, op: Op, over: str | Iterable[str], result_bytes: int, count: int = 1) -> None:
        """over: a dim, or axes."""
        over = place.axes(over) if isinstance(over, str) else tuple(over)
        axes = tuple(axis for axis, size in placement.mesh.shape.items() if axis in over and size > 1)
        if axes and count:
            found[Collective(op=op, axes=axes, result_bytes=result_bytes)] += count

    add(beside, "all-reduce", "vocab", shape.num_tokens * hidden)  # rows of the split embedding table
    for part in parts:
        staged = part.stages > 1
        place = placement.of_segment(part)
        each = part.chunk_slots if staged else part.repeats
        for block in range(part.period):
            sparse = config.moe_layers[part.first + block]
            _add_layer(add, config, place, sparse, tokens, shape.itemsize, each * ticks, dispatch)
    if placement.num_stages > 1:
        sending = ticks
        if schedule.unrolled(ticks, alone=len(parts) == 1):
            sending = sum(bool(schedule.sends(tick)) for tick in range(ticks))
        add(placement, "collective-permute", "stage", tokens * hidden, sending)
        if parts[-1].stages == 1:  # layers that follow get every micro-batch from the last stage
            add(placement, "all-reduce", "stage", tokens * hidden, ticks)
        else:
            add(placement, "all-reduce", "stage", shape.num_sampled * hidden)
    add(beside, "all-gather", "vocab", shape.num_sampled * array_sizes(config, beside).vocab * 4)  # logits, float32
    return found


def _add_layer(add, config: ModelConfig, place: Placement, sparse: bool, tokens: int, itemsize: int, count: int,
               dispatch: str) -> None:  # fmt: skip
    """One layer, `count` times over."""
    width, sizes = config.hidden_size, array_sizes(config, place)
    hidden = tokens * width * itemsize
    add(place, "all-reduce", "kv_head", hidden, count)  # attention output
    if config.qk_norm == "full":
        add(place, "all-reduce", "kv_head", tokens * 2 * 4, count)  # squares of query and key, float32
    if not sparse:
        add(place, "all-reduce", "ffn", hidden, count)
        return
    add(place, "all-reduce", place.held_experts(), hidden, count)
    over, ranks = place.layout.exchanged, place.size(place.layout.exchanged)
    experts = sizes.moe_experts // place.size(place.layout.held)  # whose weights travel beside a token
    if dispatch == "all_gather":
        add(place, "all-gather", over, ranks * tokens * (width + experts) * itemsize, count)
        add(place, "reduce-scatter", over, hidden, count)
    else:
        add(place, "all-to-all", over, ranks * tokens * (width + experts // ranks) * itemsize, count)
        add(place, "all-to-all", over, ranks * hidden, count)

"""The collectives one step holds under a layout: which, over which axes, how many, how many bytes.

Source: docs/architecture.md, "Communication is a contract"; byte counts of rings as in the Megatron-LM papers.
"""

# Dims: t tokens of this device, D width, E experts (padded), N ranks of an axis.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.depth import Schedule, segments
from jaxmoe.sharding import Placement, TokenDim, array_sizes

Op = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective: op over mesh axes, with result_bytes on each device."""

    op: Op
    axes: tuple[str, ...]
    result_bytes: int

    def sent_bytes(self, num_ranks: int) -> float:
        """Bytes one device sends: ring for all-reduce, directly for the others; a ragged one's, at most."""
        share = (num_ranks - 1) / num_ranks
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": num_ranks - 1,
            "all-to-all": share,
            "ragged-all-to-all": share,
            "collective-permute": 1,
        }
        return factor[self.op] * self.result_bytes


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What decides a step's traffic: of one rank of the batch, tokens and rows of logits, padding included.

    micro_batches: even parts in which they pass the stages of a pipeline. picked: whether rows of logits are other than
    the tokens. itemsize: bytes of a number of the activations.
    """

    num_tokens: int
    num_sampled: int
    itemsize: int
    micro_batches: int = 1
    picked: bool = False


def planned_collectives(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[Collective]:
    """Every collective of one step of one turn, and how often it runs."""
    beside = placement.seen("beside")
    schedule = Schedule(stages=placement.num_stages, chunks=placement.chunks, micro_batches=shape.micro_batches)
    ticks = schedule.ticks()
    parts = segments(config, "scan", stages=placement.num_stages, chunks=placement.chunks)
    tokens = shape.num_tokens // shape.micro_batches
    lead = beside.lead(tokens * placement.parts("batch"))
    sharing = [axis for axis in beside.axes(lead) if axis not in beside.axes("batch")]  # of a rank's tokens
    hidden = config.hidden_size * shape.itemsize
    found: Counter[Collective] = Counter()

    def add(place: Placement, op: Op, over: str | Iterable[str], result_bytes: int, count: int = 1) -> None:
        """over: a dim, or axes."""
        over = place.axes(over) if isinstance(over, str) else tuple(over)
        axes = tuple(axis for axis, size in placement.mesh.shape.items() if axis in over and size > 1)
        if axes and count:
            found[Collective(op=op, axes=axes, result_bytes=result_bytes)] += count

    if placement.num_stages == 1:  # rows of the split embedding table
        _add_sum(
            add, beside, beside.axes("vocab"), beside.shared(lead), tokens // placement.parts("page_token") * hidden
        )
    else:
        add(beside, "all-reduce", "vocab", shape.num_tokens * hidden)
    for part in parts:
        staged = part.stages > 1
        place = placement.of_segment(part)
        each = part.chunk_slots if staged else part.repeats
        for block in range(part.period):
            sparse = config.moe_layers[part.first + block]
            _add_layer(add, config, place, sparse, tokens, lead, shape.itemsize, each * ticks, dispatch)
    if placement.num_stages > 1:
        sending = ticks
        if schedule.unrolled(ticks, alone=len(parts) == 1):
            sending = sum(bool(schedule.sends(tick)) for tick in range(ticks))
        add(placement, "collective-permute", "stage", tokens // placement.size(sharing) * hidden, sending)
        if parts[-1].stages == 1:  # layers that follow get every micro-batch from the last stage
            add(placement, "all-reduce", "stage", tokens * hidden, ticks)
            add(placement, "all-gather", sharing, tokens * hidden, ticks)
            add(placement, "all-gather", sharing, shape.num_tokens * hidden)
        else:
            add(placement, "all-reduce", "stage", shape.num_sampled * hidden)
            add(placement, "all-gather", sharing, shape.num_tokens * hidden)
    elif shape.picked:
        add(placement, "all-reduce", sharing, shape.num_sampled * hidden)
    else:
        add(placement, "all-gather", sharing, shape.num_tokens * hidden)
    add(beside, "all-gather", "vocab", shape.num_sampled * array_sizes(config, beside).vocab * 4)  # logits, float32
    return found


def _add_sum(
    add, place: Placement, summed: Iterable[str], scattered: tuple[str, ...], result_bytes: int, count: int = 1
) -> None:  # fmt: skip
    """Sums of result_bytes over axes; along those scattered every rank keeps its strip."""
    if scattered:
        result_bytes //= place.size(scattered)
        add(place, "reduce-scatter", scattered, result_bytes, count)
    add(place, "all-reduce", [axis for axis in summed if axis not in scattered], result_bytes, count)


def _add_layer(add, config: ModelConfig, place: Placement, sparse: bool, tokens: int, lead: TokenDim, itemsize: int,
               count: int, dispatch: str) -> None:  # fmt: skip
    """One layer, `count` times over. tokens: of a rank of the batch."""
    sizes, context = array_sizes(config, place), place.parts("page_token")
    apart = tokens // context  # of a rank of the context
    hidden = apart * config.hidden_size * itemsize
    heads = sizes.kv_slots // place.parts("kv_head")

    def dense(dim: str) -> None:
        """Tokens gathered before a split region, summed after it."""
        add(place, "all-gather", place.shared(lead), hidden, count)
        _add_sum(add, place, place.axes(dim), place.shared(lead), hidden, count)

    dense("kv_head")
    if config.qk_norm == "full":
        add(place, "all-reduce", "kv_head", apart * 2 * 4, count)  # squares of query and key, float32
    rows = tokens * heads
    both = rows * (sizes.group_slots + 2) * config.head_dim * itemsize
    add(place, "all-gather", "page_token", both, count)  # queries, keys and values of all
    add(
        place, "all-to-all", "page_token", rows * sizes.group_slots * (config.head_dim + 1) * 4, count
    )  # what they found
    if not sparse:
        dense("ffn")
        return
    assert config.moe is not None
    gathered, summed = place.gathered(lead), place.summed_experts(lead)
    add(place, "all-gather", gathered, hidden, count)
    _add_sum(add, place, summed, gathered, hidden if gathered or lead == "token" else _strip(place, hidden), count)
    over = place.shared(lead), {axis for axis in place.axes("ffn") if place.mesh.shape[axis] > 1}
    if config.moe.shared_intermediate_size and over != (gathered, set(summed)):
        dense("ffn")
    here = hidden // place.size(place.shared(lead)) * place.size(gathered)
    _add_exchange(add, config, place, sizes, lead, here // itemsize // config.hidden_size, itemsize, count, dispatch)


def _strip(place: Placement, hidden: int) -> int:
    return hidden // place.size(place.shared("residual"))


def _add_exchange(add, config: ModelConfig, place: Placement, sizes: ArraySizes, lead: TokenDim, tokens: int,
                  itemsize: int, count: int, dispatch: str) -> None:  # fmt: skip
    """Tokens of one device to the ranks of their experts, and back."""
    assert config.moe is not None
    over, width = place.exchanged(lead), config.hidden_size
    ranks = place.size(over)
    experts = sizes.moe_experts // place.size(place.held(lead))  # whose weights travel beside a token
    packet, hidden = tokens * (width + experts // ranks) * itemsize, tokens * width * itemsize
    if dispatch == "all_gather":
        add(place, "all-gather", over, ranks * tokens * (width + experts) * itemsize, count)
        add(place, "reduce-scatter", over, hidden, count)
    elif dispatch == "ragged_all_to_all":
        static = place.platform == "cpu"
        op: Op = "all-to-all" if static else "ragged-all-to-all"
        back = ranks if static else min(ranks, config.moe.num_experts_per_tok)
        add(place, "all-to-all", over, ranks * 2 * 4, count)  # how many rows come, and where they come from
        add(place, op, over, ranks * packet, count)
        add(place, op, over, back * hidden, count)
    else:
        add(place, "all-to-all", over, ranks * packet, count)
        add(place, "all-to-all", over, ranks * hidden, count)

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
from jaxmoe.parallel.sharding import Placement, array_sizes
from jaxmoe.parallel.stages import PipelineSchedule, layer_segments

_TPU_ROW = 512
CollectiveOp = Literal[
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"
]
SiteLocation = Literal[
    "embedding", "attention", "mlp", "dispatch", "experts", "combine", "shared expert", "between stages",
    "from the last stage", "sampled rows", "head",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective: op over mesh axes, with result_bytes on each device."""

    op: CollectiveOp
    axes: tuple[str, ...]
    result_bytes: int

    def whole_bytes(self, num_ranks: int) -> int:
        """Of the whole message: an all-reduce's buffer, an all-gather's result, what a reduce-scatter sums."""
        return self.result_bytes * (num_ranks if self.op == "reduce-scatter" else 1)

    def sent_bytes(self, num_ranks: int) -> float:
        """Bytes one device sends: ring for all-reduce, directly for the others; a ragged one's, at most."""
        return sent_of(self.op, self.whole_bytes(num_ranks), num_ranks)


def sent_of(op: CollectiveOp, whole_bytes: float, num_ranks: int) -> float:
    """Of a whole message, the bytes that one of its ranks sends."""
    if op == "collective-permute":
        return whole_bytes
    return (2 if op == "all-reduce" else 1) * whole_bytes * (num_ranks - 1) / num_ranks


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


@dataclass(frozen=True, kw_only=True)
class CollectiveSite:
    """A collective where the forward pass holds it, and how often a step runs it there.

    segment, block: of the layers (depth.LayerSegment) that each run it; None outside of layers. Sites of one
    location come in the order in which a token passes them.
    """

    location: SiteLocation
    collective: Collective
    count: int
    segment: int | None = None
    block: int | None = None


def planned_collectives(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[Collective]:
    """Every collective of one step of one decode step, whose tokens are drawn at its end, and how often it runs."""
    return _counted(planned_sites(config, placement, shape, dispatch=dispatch))


def planned_decode_step(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[Collective]:
    """Every collective of one iteration of the loop that decodes several tokens: a decode step, or a tick of a
    pipeline."""
    return _counted(planned_decode_step_sites(config, placement, shape, dispatch=dispatch))


def _counted(sites: Iterable[CollectiveSite]) -> Counter[Collective]:
    counts: Counter[Collective] = Counter()
    for site in sites:
        counts[site.collective] += site.count
    return counts


def planned_sites(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> list[CollectiveSite]:
    """What planned_collectives counts, place by place."""
    plan = _SitePlanner(config, placement, shape, dispatch)
    token_shard_axes, hidden = plan.token_shard_axes, plan.hidden
    plan.location = "embedding"
    if placement.num_stages == 1:
        plan.sum(plan.outside, "vocab", plan.shared_rows * hidden, 1)  # rows of the split embedding table
        plan.layers(1)
        op: CollectiveOp = "all-reduce" if shape.picked else "all-gather"
        plan.location = "sampled rows"
        plan.add(placement, op, token_shard_axes, (shape.num_sampled if shape.picked else shape.num_tokens) * hidden)
    else:
        schedule = plan.schedule
        ticks = sending = schedule.ticks()
        if schedule.unrolled(ticks, alone=len(plan.segments) == 1):
            sending = sum(bool(schedule.sends(tick)) for tick in range(ticks))
        plan.add(plan.outside, "all-reduce", "vocab", shape.num_tokens * hidden)
        plan.layers(ticks)
        plan.send(sending)
        if plan.segments[-1].stages == 1:  # layers that follow get every micro-batch from the last stage
            plan.from_last(ticks)
            plan.location = "sampled rows"
        else:
            plan.location = "sampled rows"
            plan.add(placement, "all-reduce", "stage", shape.num_sampled * hidden)
        plan.add(placement, "all-gather", token_shard_axes, shape.num_tokens * hidden)
    plan.logits(shape.num_sampled)
    return plan.sites


def planned_decode_step_sites(
    config: ModelConfig, placement: Placement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> list[CollectiveSite]:
    """What planned_decode_step counts, place by place."""
    if placement.num_stages == 1:
        return planned_sites(config, placement, shape, dispatch=dispatch)
    plan = _SitePlanner(config, placement, shape, dispatch)
    plan.location = "embedding"
    if placement.sequence_gather_axes(plan.token_dim):
        plan.sum(plan.outside, "vocab", plan.shared_rows * plan.hidden, 1)
    else:
        plan.add(plan.outside, "all-reduce", "vocab", plan.tokens * plan.hidden)
    plan.layers(1)
    plan.send(1)
    plan.from_last(1)
    plan.location = "sampled rows"
    plan.add(placement, "all-gather", plan.token_shard_axes, plan.tokens * plan.hidden)
    plan.logits(plan.tokens)
    return plan.sites


class _SitePlanner:
    """The collectives of a step as they are found, with what all of them are counted by.

    tokens: of a rank of the batch, in one micro-batch; shared_rows: of a rank of the context. hidden: bytes of a
    token's hidden state. token_shard_axes: axes that share out a rank's tokens between layers; strip: how many each
    then has. location, layer (segment and block): of what is found next.
    """

    def __init__(self, config: ModelConfig, placement: Placement, shape: StepShape, dispatch: str) -> None:
        self.config, self.placement, self.itemsize, self.dispatch = config, placement, shape.itemsize, dispatch
        self.outside = placement.with_view("outside_pipeline")
        self.schedule = PipelineSchedule(
            stages=placement.num_stages, virtual_stages=placement.virtual_stages, micro_batches=shape.micro_batches
        )
        self.segments = layer_segments(
            config, "scan", stages=placement.num_stages, virtual_stages=placement.virtual_stages
        )
        self.tokens = shape.num_tokens // shape.micro_batches
        self.shared_rows = self.tokens // placement.num_shards("page_token")
        self.hidden = config.hidden_size * shape.itemsize
        self.token_dim = placement.token_dim(self.tokens * placement.num_shards("batch"))
        self.token_shard_axes = placement.token_shard_axes(self.token_dim)
        self.strip = self.tokens // placement.size(self.token_shard_axes)
        self.location: SiteLocation = "embedding"
        self.layer: tuple[int, int] | None = None
        self.sites: list[CollectiveSite] = []
        self._sizes: dict[str, ArraySizes] = {}

    def sizes(self, placement: Placement) -> ArraySizes:
        """Padded as seen from a place."""
        if placement.view not in self._sizes:
            self._sizes[placement.view] = array_sizes(self.config, placement)
        return self._sizes[placement.view]

    def add(
        self, placement: Placement, op: CollectiveOp, over: str | Iterable[str], result_bytes: int, count: int = 1
    ) -> None:
        """One kind of collective over a dim's axes, or over axes."""
        over = placement.axes(over) if isinstance(over, str) else tuple(over)
        axes = tuple(axis for axis, size in placement.mesh.shape.items() if axis in over and size > 1)
        if axes and count:
            collective = Collective(op=op, axes=axes, result_bytes=result_bytes)
            segment, block = self.layer or (None, None)
            self.sites.append(
                CollectiveSite(location=self.location, collective=collective, count=count, segment=segment, block=block)
            )

    def sum(self, placement: Placement, over: str | Iterable[str], result_bytes: int, count: int) -> None:
        """Sums over axes; along those that share out tokens between layers every rank keeps its strip."""
        over = placement.axes(over) if isinstance(over, str) else tuple(over)
        scattered = [axis for axis in placement.sequence_gather_axes(self.token_dim) if axis in over]
        strip = result_bytes // placement.size(scattered)
        self.add(placement, "reduce-scatter", scattered, strip, count)
        self.add(placement, "all-reduce", [axis for axis in over if axis not in scattered], strip, count)

    def gather(self, placement: Placement, axes: Iterable[str], rows: int, count: int) -> None:
        """Strips of tokens between the layers to all the tokens a split region needs."""
        self.add(placement, "all-gather", axes, rows * self.hidden, count)

    def send(self, count: int) -> None:
        """Hidden states from stage to stage."""
        self.location = "between stages"
        self.add(self.placement, "collective-permute", "stage", self.strip * self.hidden, count)

    def from_last(self, count: int) -> None:
        """Hidden states of the last stage to all."""
        self.location = "from the last stage"
        self.add(self.placement, "all-reduce", "stage", self.strip * self.hidden, count)

    def logits(self, rows: int) -> None:
        """float32."""
        self.location = "head"
        self.add(self.outside, "all-gather", "vocab", rows * self.sizes(self.outside).vocab * 4)

    def layers(self, ticks: int) -> None:
        """All layers, as often as they run."""
        for number, segment in enumerate(self.segments):
            each = segment.virtual_stage_slots if segment.stages > 1 else segment.repeats
            for block in range(segment.period):
                self.layer = number, block
                placement, count = self.placement.for_layers(segment), each * ticks
                self.attention(placement, count)
                if self.config.moe_layers[segment.first + block]:
                    self.experts(placement, count)
                else:
                    self.mlp(placement, count)
        self.layer = None

    def mlp(self, placement: Placement, count: int) -> None:
        """A region split by its width: tokens gathered before it, summed after it."""
        self.location = "mlp"
        self.gather(placement, placement.sequence_gather_axes(self.token_dim), self.shared_rows, count)
        self.sum(placement, "ffn", self.shared_rows * self.hidden, count)

    def attention(self, placement: Placement, count: int) -> None:
        """Split by heads, with what ranks of a context tell each other: queries, keys and values of all, and what they
        found."""
        self.location = "attention"
        self.gather(placement, placement.sequence_gather_axes(self.token_dim), self.shared_rows, count)
        config, sizes = self.config, self.sizes(placement)
        if config.qk_norm == "full":  # squares of query and key, float32
            self.add(placement, "all-reduce", "kv_head", self.shared_rows * 2 * 4, count)
        slots = self.tokens * sizes.kv_slots // placement.num_shards("kv_head")
        both = slots * sum((sizes.group_slots * config.cached_dims[0], *config.cached_dims)) * self.itemsize
        self.add(placement, "all-gather", "page_token", both, count)
        self.add(
            placement,
            "all-to-all",
            "page_token",
            slots * sizes.group_slots * (config.attention_output_dim + 1) * 4,
            count,
        )
        self.sum(placement, "kv_head", self.shared_rows * self.hidden, count)

    def experts(self, placement: Placement, count: int) -> None:
        """An MoE block: see model/moe.py."""
        self.location = "experts"
        moe, gather_axes, summed = (
            self.config.moe,
            placement.ep_gather_axes(self.token_dim),
            placement.expert_reduce_axes(self.token_dim),
        )
        assert moe is not None
        # Ranks that exchange what they do not gather.
        apart = placement.size(placement.sequence_gather_axes(self.token_dim)) // placement.size(gather_axes)
        rows = self.shared_rows // apart
        self.gather(placement, gather_axes, rows, count)
        self.exchange(placement, rows, count)
        sequence_axes = placement.sequence_gather_axes(self.token_dim)
        if moe.shared_intermediate_size and sequence_axes != gather_axes:  # gathered by itself, and scattered
            self.location = "shared expert"
            self.gather(placement, sequence_axes, self.shared_rows, count)
            self.sum(placement, sequence_axes, self.shared_rows * self.hidden, count)
        self.location = "experts"
        self.sum(placement, summed, rows * self.hidden, count)

    def exchange(self, placement: Placement, rows: int, count: int) -> None:
        """So many tokens of a device to the ranks of their experts, and back: level by level, and back through them."""
        over = tuple(axis for axis in placement.ep_exchange_axes(self.token_dim) if placement.mesh.shape[axis] > 1)
        # Weights of the experts there travel beside a token.
        places = self.sizes(placement).moe_experts // placement.size(placement.ep_replicated_axes(self.token_dim))
        levels = [(over, rows, places, self.dispatch)]
        if self.dispatch.startswith("hierarchical"):
            inner = "ragged_all_to_all" if self.dispatch == "hierarchical_ragged" else "all_to_all"
            ranks = placement.size(over[:1])
            levels = [(over[:1], rows, places, "all_to_all"), (over[1:], rows * ranks, places // ranks, inner)]
        self.location = "dispatch"
        for axes, sent, split, backend in levels:
            packet = sent * (self.config.hidden_size + split // placement.size(axes)) * self.itemsize
            if backend == "all_gather":
                packet = sent * (self.config.hidden_size + split) * self.itemsize
                self.add(placement, "all-gather", axes, placement.size(axes) * packet, count)
                continue
            if backend == "ragged_all_to_all":  # how many rows come, and where they come from
                self.add(placement, "all-to-all", axes, placement.size(axes) * 2 * 4, count)
            self.add(placement, *self._carried(placement, axes, backend, sent, packet, placement.size(axes)), count)
        self.location = "combine"
        for axes, sent, _, backend in reversed(levels):
            back = sent * self.config.hidden_size * self.itemsize
            if backend == "all_gather":
                whole = sent % placement.strip_rows == 0
                self.add(placement, *(("reduce-scatter", axes, back) if whole else
                                  ("all-reduce", axes, placement.size(axes) * back)), count)  # fmt: skip
                continue
            self.add(
                placement,
                *self._carried(placement, axes, backend, sent, back, self._max_ranks(placement, axes, backend)),
                count,
            )

    def _max_ranks(self, placement: Placement, axes: tuple[str, ...], backend: str) -> int:
        """Ranks from which a token's results come back, at most."""
        ranks, moe = placement.size(axes), self.config.moe
        assert moe is not None
        ragged = backend == "ragged_all_to_all" and placement.platform != "cpu"
        return min(ranks, moe.num_experts_per_tok) if ragged else ranks

    def _carried(
        self, placement: Placement, axes: tuple[str, ...], backend: str, rows: int, num_bytes: int, ranks: int
    ) -> tuple[CollectiveOp, tuple[str, ...], int]:
        """The collective that carries so many rows to, or from, so many ranks, as a platform has it."""
        if backend != "ragged_all_to_all" or placement.platform == "cpu":
            return "all-to-all", axes, ranks * num_bytes
        if placement.platform == "tpu" and rows:  # XLA rounds the bytes of a row up
            num_bytes = rows * -(-num_bytes // rows // _TPU_ROW) * _TPU_ROW
        return "ragged-all-to-all", axes, ranks * num_bytes

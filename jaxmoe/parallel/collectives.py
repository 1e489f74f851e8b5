"""Plan the collectives of one step under a layout: ops, mesh axes, counts and bytes.

Source: docs/architecture.md, "Communication is a contract"; byte counts of rings as in the Megatron-LM papers.
"""

# Dims: t tokens of this device, D width, E experts (padded), N ranks of an axis.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes
from jaxmoe.parallel.stages import PipelineSchedule, layer_segments

_TPU_ROW = 512
CollectiveKind = Literal[
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"
]
SiteLocation = Literal[
    "embedding", "attention", "mlp", "dispatch", "experts", "combine", "shared expert", "between stages",
    "from the last stage", "sampled rows", "head", "step output",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CollectiveOp:
    """Describe one kind of collective: an op over mesh axes, with result_bytes on each device."""

    op: CollectiveKind
    axes: tuple[str, ...]
    result_bytes: int

    def whole_bytes(self, num_ranks: int) -> int:
        """Return the bytes of the whole message.

        It is the buffer of an all-reduce, the result of an all-gather, the input of a reduce-scatter.
        """
        return self.result_bytes * (num_ranks if self.op == "reduce-scatter" else 1)

    def sent_bytes(self, num_ranks: int) -> float:
        """Return the bytes one device sends: an all-reduce by a ring, others directly; an upper bound if ragged."""
        return sent_of(self.op, self.whole_bytes(num_ranks), num_ranks)


def sent_of(op: CollectiveKind, whole_bytes: float, num_ranks: int) -> float:
    """Return the bytes that each rank sends for a whole message."""
    if op == "collective-permute":
        return whole_bytes
    return (2 if op == "all-reduce" else 1) * whole_bytes * (num_ranks - 1) / num_ranks


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Describe the arrays that determine a step's traffic.

    num_tokens, num_sampled: tokens and rows of logits of one data parallel rank, including padding. itemsize: bytes of
    an activation element. micro_batches: number of equal pipeline micro-batches. picked: whether logits are computed
    for selected rows and not for all tokens. output_bytes: bytes of the sampled tokens that a program returns, if every
    process gets all of them; 0 if the mesh is in one process.
    """

    num_tokens: int
    num_sampled: int
    itemsize: int
    micro_batches: int = 1
    picked: bool = False
    output_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class CollectiveSite:
    """Locate a collective in the forward pass, with the number of times that a step runs it there.

    segment, block: indices of the layer segment (depth.LayerSegment) and its block; None outside the layers. Sites of
    one location are in the order in which a token passes them.
    """

    location: SiteLocation
    collective: CollectiveOp
    count: int
    segment: int | None = None
    block: int | None = None


def planned_collectives(
    config: ModelConfig, placement: MeshPlacement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[CollectiveOp]:
    """Count every collective of an engine step with one decode step, including sampling."""
    return _counted(planned_sites(config, placement, shape, dispatch=dispatch))


def planned_decode_step(
    config: ModelConfig, placement: MeshPlacement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> Counter[CollectiveOp]:
    """Count every collective of one iteration of the multi-step decode loop: a decode step, or a pipeline tick."""
    return _counted(planned_decode_step_sites(config, placement, shape, dispatch=dispatch))


def _counted(sites: Iterable[CollectiveSite]) -> Counter[CollectiveOp]:
    counts: Counter[CollectiveOp] = Counter()
    for site in sites:
        counts[site.collective] += site.count
    return counts


def planned_sites(
    config: ModelConfig, placement: MeshPlacement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> list[CollectiveSite]:
    """Return the collective sites that planned_collectives counts."""
    plan = _SitePlanner(config, placement, shape, dispatch)
    token_shard_axes, hidden = plan.token_shard_axes, plan.hidden
    plan.location = "embedding"
    if placement.num_stages == 1:
        plan.sum(plan.outside, "vocab", plan.shared_rows * hidden, 1)  # rows of the vocabulary-parallel embedding
        plan.layers(1)
        op: CollectiveKind = "all-reduce" if shape.picked else "all-gather"
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
        if plan.segments[-1].stages == 1:  # layers after the pipeline receive every micro-batch from the last stage
            plan.from_last(ticks)
            plan.location = "sampled rows"
        else:
            plan.location = "sampled rows"
            plan.add(placement, "all-reduce", "stage", shape.num_sampled * hidden)
        plan.add(placement, "all-gather", token_shard_axes, shape.num_tokens * hidden)
    plan.logits(shape.num_sampled)
    plan.output()
    return plan.sites


def planned_decode_step_sites(
    config: ModelConfig, placement: MeshPlacement, shape: StepShape, *, dispatch: str = "all_to_all"
) -> list[CollectiveSite]:
    """Return the collective sites that planned_decode_step counts."""
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
    plan.output()
    return plan.sites


class _SitePlanner:
    """Collect the collective sites of a step in the order of the forward pass.

    tokens: tokens of a data parallel rank in one micro-batch. shared_rows: tokens of a context-parallel rank. hidden:
    bytes of a token's hidden state. token_shard_axes: axes that shard a rank's tokens between layers. strip: tokens per
    shard. location, layer (segment and block): position of the next site.
    """

    def __init__(self, config: ModelConfig, placement: MeshPlacement, shape: StepShape, dispatch: str) -> None:
        self.config, self.placement, self.itemsize, self.dispatch = config, placement, shape.itemsize, dispatch
        self.outside = placement.with_view("outside_pipeline")
        self.schedule = PipelineSchedule(
            stages=placement.num_stages, virtual_stages=placement.virtual_stages, micro_batches=shape.micro_batches
        )
        self.segments = layer_segments(
            config, "scan", stages=placement.num_stages, virtual_stages=placement.virtual_stages
        )
        self.tokens, self.output_bytes = shape.num_tokens // shape.micro_batches, shape.output_bytes
        self.shared_rows = self.tokens // placement.num_shards("page_token")
        self.hidden = config.hidden_size * shape.itemsize
        self.token_dim = placement.token_dim(self.tokens * placement.num_shards("batch"))
        self.token_shard_axes = placement.token_shard_axes(self.token_dim)
        self.strip = self.tokens // placement.size(self.token_shard_axes)
        self.location: SiteLocation = "embedding"
        self.layer: tuple[int, int] | None = None
        self.sites: list[CollectiveSite] = []
        self._sizes: dict[str, ArraySizes] = {}

    def sizes(self, placement: MeshPlacement) -> ArraySizes:
        """Return the padded array sizes for the view of a placement."""
        if placement.view not in self._sizes:
            self._sizes[placement.view] = array_sizes(self.config, placement)
        return self._sizes[placement.view]

    def add(
        self, placement: MeshPlacement, op: CollectiveKind, over: str | Iterable[str], result_bytes: int, count: int = 1
    ) -> None:
        """Add a collective over the axes of a logical dim, or over given mesh axes."""
        over = placement.axes(over) if isinstance(over, str) else tuple(over)
        axes = tuple(axis for axis, size in placement.mesh.shape.items() if axis in over and size > 1)
        if axes and count:
            collective = CollectiveOp(op=op, axes=axes, result_bytes=result_bytes)
            segment, block = self.layer or (None, None)
            self.sites.append(
                CollectiveSite(location=self.location, collective=collective, count=count, segment=segment, block=block)
            )

    def sum(self, placement: MeshPlacement, over: str | Iterable[str], result_bytes: int, count: int) -> None:
        """Add a reduction: a reduce-scatter along axes that shard tokens between layers, an all-reduce along others."""
        over = placement.axes(over) if isinstance(over, str) else tuple(over)
        scattered = [axis for axis in placement.sequence_gather_axes(self.token_dim) if axis in over]
        strip = result_bytes // placement.size(scattered)
        self.add(placement, "reduce-scatter", scattered, strip, count)
        self.add(placement, "all-reduce", [axis for axis in over if axis not in scattered], strip, count)

    def gather(self, placement: MeshPlacement, axes: Iterable[str], rows: int, count: int) -> None:
        """Add the all-gather of sequence-sharded tokens before a sharded region."""
        self.add(placement, "all-gather", axes, rows * self.hidden, count)

    def send(self, count: int) -> None:
        """Add the permutes of hidden states from stage to stage."""
        self.location = "between stages"
        self.add(self.placement, "collective-permute", "stage", self.strip * self.hidden, count)

    def from_last(self, count: int) -> None:
        """Add the broadcast (as an all-reduce) of the last stage's hidden states."""
        self.location = "from the last stage"
        self.add(self.placement, "all-reduce", "stage", self.strip * self.hidden, count)

    def logits(self, rows: int) -> None:
        """Add the all-gather of the float32 logits."""
        self.location = "head"
        self.add(self.outside, "all-gather", "vocab", rows * self.sizes(self.outside).vocab * 4)

    def output(self) -> None:
        """Add the all-gather of a program's output to every process."""
        if self.output_bytes:
            self.location = "step output"
            self.add(self.placement, "all-gather", "batch", self.output_bytes)

    def layers(self, ticks: int) -> None:
        """Add all layers; ticks: number of times that each runs."""
        for number, segment in enumerate(self.segments):
            each = segment.virtual_stage_slots if segment.stages > 1 else segment.repeats
            for block in range(segment.period):
                self.layer = number, block
                placement, count = self.placement.for_layers(segment), each * ticks
                self.attention(placement, self.config.cache_spec(segment.first + block).head_dims, count)
                if self.config.moe_layers[segment.first + block]:
                    self.experts(placement, count)
                else:
                    self.mlp(placement, count)
        self.layer = None

    def mlp(self, placement: MeshPlacement, count: int) -> None:
        """Add a tensor-parallel MLP: tokens are gathered before it and reduced after it."""
        self.location = "mlp"
        self.gather(placement, placement.sequence_gather_axes(self.token_dim), self.shared_rows, count)
        self.sum(placement, "ffn", self.shared_rows * self.hidden, count)

    def attention(self, placement: MeshPlacement, head_dims: tuple[int, ...], count: int) -> None:
        """Add attention sharded by heads.

        Context-parallel ranks also all-gather queries, keys and values, and exchange partial attention outputs.
        """
        self.location = "attention"
        self.gather(placement, placement.sequence_gather_axes(self.token_dim), self.shared_rows, count)
        config, sizes = self.config, self.sizes(placement)
        if config.qk_norm == "full":  # squares of query and key, float32
            self.add(placement, "all-reduce", "kv_head", self.shared_rows * 2 * 4, count)
        slots = self.tokens * sizes.kv_slots // placement.num_shards("kv_head")
        both = slots * sum((sizes.group_slots * head_dims[0], *head_dims)) * self.itemsize
        self.add(placement, "all-gather", "page_token", both, count)
        self.add(
            placement,
            "all-to-all",
            "page_token",
            slots * sizes.group_slots * (config.attention_output_dim + 1) * 4,
            count,
        )
        self.sum(placement, "kv_head", self.shared_rows * self.hidden, count)

    def experts(self, placement: MeshPlacement, count: int) -> None:
        """Add an MoE block; see model/moe.py."""
        self.location = "experts"
        moe, gather_axes, summed = (
            self.config.moe,
            placement.ep_gather_axes(self.token_dim),
            placement.expert_reduce_axes(self.token_dim),
        )
        assert moe is not None
        # Ranks that exchange tokens instead of gathering them.
        apart = placement.size(placement.sequence_gather_axes(self.token_dim)) // placement.size(gather_axes)
        rows = self.shared_rows // apart
        self.gather(placement, gather_axes, rows, count)
        self.exchange(placement, rows, count)
        sequence_axes = placement.sequence_gather_axes(self.token_dim)
        if moe.shared_intermediate_size and sequence_axes != gather_axes:  # has its own gather and scatter
            self.location = "shared expert"
            self.gather(placement, sequence_axes, self.shared_rows, count)
            self.sum(placement, sequence_axes, self.shared_rows * self.hidden, count)
        self.location = "experts"
        self.sum(placement, summed, rows * self.hidden, count)

    def exchange(self, placement: MeshPlacement, rows: int, count: int) -> None:
        """Add dispatch and combine of `rows` tokens per device: level by level, and back in reverse order."""
        over = tuple(axis for axis in placement.ep_exchange_axes(self.token_dim) if placement.mesh.shape[axis] > 1)
        # Every token is sent with its router weights for the experts of the destination.
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
            if backend == "ragged_all_to_all":  # row counts, and their offsets at the sender
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

    def _max_ranks(self, placement: MeshPlacement, axes: tuple[str, ...], backend: str) -> int:
        """Return the most ranks that send results back for one token."""
        ranks, moe = placement.size(axes), self.config.moe
        assert moe is not None
        ragged = backend == "ragged_all_to_all" and placement.platform != "cpu"
        return min(ranks, moe.num_experts_per_tok) if ragged else ranks

    def _carried(
        self, placement: MeshPlacement, axes: tuple[str, ...], backend: str, rows: int, num_bytes: int, ranks: int
    ) -> tuple[CollectiveKind, tuple[str, ...], int]:
        """Return the platform's collective for `rows` rows of num_bytes in all, to or from each of `ranks` ranks."""
        if backend != "ragged_all_to_all" or placement.platform == "cpu":
            return "all-to-all", axes, ranks * num_bytes
        if placement.platform == "tpu" and rows:  # XLA rounds the bytes of a row up
            num_bytes = rows * -(-num_bytes // rows // _TPU_ROW) * _TPU_ROW
        return "ragged-all-to-all", axes, ranks * num_bytes

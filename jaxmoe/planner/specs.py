"""Enumerate the ways to split a model over devices: a mesh, a layout and a few options, as for --mesh and --layout.

No rule here prefers a split for a model: the usual advice must follow from the estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.ops.dispatch import HIERARCHICAL, MAX_RAGGED_GPUS, unsupported_reason
from jaxmoe.parallel.layouts import LAYOUTS, ShardingLayout
from jaxmoe.parallel.mesh import PlannedMesh, device_platform
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.hardware import HardwareSpec
from jaxmoe.planner.serving import RequestWorkload

Objective = Literal["latency", "throughput", "cost"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "cost")
# Prompt tokens per step and rank that the search tries unless the request fixes them, and the first it tries.
CHUNKS, FIRST_CHUNK = (512, 2048, 8192), 2048
# Largest axes that the search tries; --mesh may have larger ones.
_MAX_STAGES, _MAX_TENSOR = 16, 64


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Describe what to search for: model, hardware, devices, workload, objective and limits.

    ttft_limit, tpot_limit: in seconds. skew: of the expert loads (cost.SKEW). axes, layout, dispatch, virtual_stages,
    chunk_tokens: fixed values; searched if None.
    """

    config: ModelConfig
    hardware: HardwareSpec
    devices: int
    workload: RequestWorkload
    objective: Objective = "throughput"
    ttft_limit: float | None = None
    tpot_limit: float | None = None
    kv_dtype: str | None = None
    skew: float = SKEW
    axes: Mapping[str, int] | None = None
    layout: ShardingLayout | None = None
    dispatch: str | None = None
    virtual_stages: int | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """Describe one way to split a model over devices."""

    axes: tuple[tuple[str, int], ...]
    layout: ShardingLayout
    dispatch: str
    virtual_stages: int
    chunk_tokens: int

    @property
    def mesh(self) -> str:
        """Return the mesh in the format of --mesh."""
        shown = [f"{axis}={size}" for axis, size in self.axes if size > 1]
        return ",".join(shown) or "data=1"


def candidates_of(request: SearchRequest) -> Iterator[ParallelismConfig]:
    """Yield every way to split the model over the devices, without equivalent ones."""
    config, moe = request.config, request.config.moe is not None
    layouts = [request.layout] if request.layout else list(LAYOUTS.values())
    all_axes = [tuple(request.axes.items())] if request.axes else list(_all_axes(request.devices, config))
    seen: set[tuple[object, ...]] = set()
    for axes in all_axes:
        sizes = dict(axes)
        for layout in layouts:
            if not request.layout and not _worth(config, layout, sizes):
                continue
            for virtual_stages in _virtual_stages(request, sizes):
                for dispatch in _dispatches(request, placement_of(request.hardware, axes, layout)):
                    means = (_meaning(axes, layout, moe, apart=dispatch in HIERARCHICAL), dispatch, virtual_stages)
                    if means not in seen:
                        seen.add(means)
                        yield ParallelismConfig(
                            axes=axes, layout=layout, dispatch=dispatch, virtual_stages=virtual_stages,
                            chunk_tokens=request.chunk_tokens or FIRST_CHUNK,
                        )  # fmt: skip


def _meaning(
    axes: tuple[tuple[str, int], ...], layout: ShardingLayout, moe: bool, *, apart: bool
) -> tuple[object, ...]:
    """Return the role and size of each mesh axis, outermost first; two splits with equal results are equivalent.

    Adjacent axes of the same role are merged, unless they are levels of a hierarchical dispatch (apart).
    """
    merged: list[tuple[object, int]] = []
    experts = (layout.experts, layout.expert_width) if moe else ()
    parts = (layout.batch, layout.split, layout.context, layout.sequence, *experts)
    for axis, size in axes:
        does = axis == "pipeline" or tuple(axis in part for part in parts)
        if size == 1:
            continue
        if merged and merged[-1][0] == does and not (apart and axis in layout.experts):
            size *= merged.pop()[1]
        merged.append((does, size))
    return tuple(merged)


def _all_axes(devices: int, config: ModelConfig) -> Iterator[tuple[tuple[str, int], ...]]:
    """Yield all sizes of the axes data, pipeline, expert and tensor whose product is the number of devices.

    The expert axis of a dense model has size 1, since it would be another data axis.
    """
    for pipeline in _divisors(devices):
        if pipeline > min(config.num_hidden_layers, _MAX_STAGES):
            continue
        for tensor in [one for one in _divisors(devices // pipeline) if one <= _MAX_TENSOR]:
            rest = devices // pipeline // tensor
            for expert in _divisors(rest) if config.moe else [1]:
                sizes = {"data": rest // expert, "pipeline": pipeline, "expert": expert, "tensor": tensor}
                if config.moe is None or expert <= config.moe.num_experts:
                    yield tuple(sizes.items())


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _worth(config: ModelConfig, layout: ShardingLayout, sizes: Mapping[str, int]) -> bool:
    """Return whether a layout has at most one shard per attention head and at most 16 context-parallel ranks."""
    split = math.prod(sizes[axis] for axis in layout.split)
    context = math.prod(sizes[axis] for axis in layout.context)
    return split <= config.num_attention_heads and context <= 16


def _dispatches(request: SearchRequest, placement: MeshPlacement) -> Iterator[str]:
    """Yield the dispatch backends that differ on the placement and that the hardware supports."""
    if request.dispatch:
        if _why_not(request.dispatch, placement) is None:
            yield request.dispatch
        return
    yield "all_to_all"
    if request.config.moe is None or not placement.dispatch_levels:
        return
    kinds = ["all_gather", "ragged_all_to_all", *(HIERARCHICAL if len(placement.dispatch_levels) > 1 else ())]
    most = {"tpu": math.inf, "cuda": MAX_RAGGED_GPUS}.get(request.hardware.platform, 1)
    yield from (kind for kind in kinds if placement.ragged_peers(kind) <= most)


def _why_not(dispatch: str, placement: MeshPlacement) -> str | None:
    """Return why a placement does not support the requested dispatch; None if it does."""
    if dispatch != "all_to_all" and not placement.dispatch_levels:
        return "exchanges tokens between expert-parallel ranks, but this mesh and layout exchange none: omit it"
    return unsupported_reason(dispatch, placement)


def why_none(request: SearchRequest) -> str:
    """Return why no candidate matches the request."""
    axes = [tuple(request.axes.items())] if request.axes else list(_all_axes(request.devices, request.config))
    layouts = [request.layout] if request.layout else list(LAYOUTS.values())
    many = f"{request.devices} device{'s' * (request.devices > 1)}"
    if request.virtual_stages and all(dict(one)["pipeline"] == 1 for one in axes):
        return f"virtual_stages={request.virtual_stages} needs stages: no mesh of {many} has any; omit it"
    assert request.dispatch is not None
    placements = (placement_of(request.hardware, one, layout) for one in axes for layout in layouts)
    why = next(
        filter(None, (_why_not(request.dispatch, placement) for placement in placements)),
        f"has no valid mesh of {many}",
    )
    return f"dispatch={request.dispatch} {why}"


def _virtual_stages(request: SearchRequest, sizes: Mapping[str, int]) -> Iterable[int]:
    if request.virtual_stages:
        return [request.virtual_stages] if request.virtual_stages == 1 or sizes["pipeline"] > 1 else []
    return [1, 2] if sizes["pipeline"] > 1 else [1]


def kind_of(parallelism: ParallelismConfig, *, moe: bool) -> str:
    """Format the degrees of parallelism of a split: TP8 PP2, EP16, DP8."""
    sizes, layout = dict(parallelism.axes), parallelism.layout
    degree = {
        "TP": math.prod(sizes[axis] for axis in layout.split), "PP": sizes["pipeline"],
        "CP": math.prod(sizes[axis] for axis in layout.context),
        "EP": math.prod(sizes[axis] for axis in layout.experts) if moe else 1,
    }  # fmt: skip
    spread = [axis for axis in layout.batch if not (moe and axis in (*layout.experts, *layout.expert_width))]
    degree["DP"] = math.prod(sizes[axis] for axis in spread)
    return " ".join(f"{name}{size}" for name, size in degree.items() if size > 1) or "one device"


def placement_of(
    hardware: HardwareSpec, axes: tuple[tuple[str, int], ...], layout: ShardingLayout, *, virtual_stages: int = 1
) -> MeshPlacement:  # fmt: skip
    """Return a placement on devices of a platform that need not be present."""
    platform = device_platform(hardware.platform)
    return MeshPlacement(
        mesh=cast("Mesh", PlannedMesh(dict(axes), platform)), layout=layout, virtual_stages=virtual_stages
    )

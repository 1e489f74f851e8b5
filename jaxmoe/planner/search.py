"""Every split that some devices allow, priced: the best by an objective, the front of throughput against latency.

A plan is a mesh, a layout and a few options, as `--mesh` and `--layout` take them. Nothing here knows which split suits
which model: what the field advises must come out of the prices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, cast

from jax.sharding import Mesh

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.layouts import LAYOUTS, Layout
from jaxmoe.mesh import PlannedMesh
from jaxmoe.ops.dispatch import HIERARCHICAL, MOST_RAGGED_GPUS
from jaxmoe.planner.cost import SILENT, SKEW, StepCost
from jaxmoe.planner.hardware import Hardware
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import Held
from jaxmoe.planner.serving import Load, Served, Serving
from jaxmoe.sharding import Placement

Objective = Literal["latency", "throughput", "cost"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "cost")
_CHUNKS = (512, 2048, 8192)  # prompt tokens of a step and rank
# Requests a device at once where the lowest latency is asked for and nobody says how many there are.
LATENCY_REQUESTS = 4
# Plans whose values lie so near are as good as each other: prices are not that exact.
ALIKE = 0.03
# Specs that would be so much worse than the best if they said nothing are not priced with what they say.
_HOPELESS = 1.1
# Axes are not looked at beyond these; a plan asked for with --mesh may have more.
_MOST_STAGES, _MOST_TENSOR = 16, 64
_LEADING = 12  # plans whose other options are looked at too


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned. ttft_limit, tpot_limit: seconds. The last five: as asked for; searched where None."""

    config: ModelConfig
    hardware: Hardware
    devices: int
    load: Load
    objective: Objective = "throughput"
    ttft_limit: float | None = None
    tpot_limit: float | None = None
    kv_dtype: str | None = None
    skew: float = SKEW
    axes: Mapping[str, int] | None = None
    layout: Layout | None = None
    dispatch: str | None = None
    stage_chunks: int | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One way to split a model."""

    axes: tuple[tuple[str, int], ...]
    layout: Layout
    dispatch: str
    stage_chunks: int
    chunk_tokens: int

    @property
    def mesh(self) -> str:
        """As --mesh takes it."""
        shown = [f"{axis}={size}" for axis, size in self.axes if size > 1]
        return ",".join(shown) or "data=1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A spec that fits, and what it serves at one concurrency. Bytes are one device's."""

    spec: Spec
    served: Served
    serving: Serving
    most_requests: int

    @property
    def tokens_a_second(self) -> float:
        """Generated, over all devices."""
        return self.served.tokens_a_second

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(size for _, size in self.spec.axes)

    @property
    def request_seconds(self) -> float:
        """From a request's arrival to its last token."""
        return self.served.ttft + (self.osl - 1) * self.served.tpot

    @property
    def osl(self) -> int:
        """Tokens each request generates."""
        return self.served.osl


@dataclass(frozen=True, kw_only=True)
class Found:
    """best: the plan chosen; every: one of each spec that fits, the best of it first; front: those plans that none
    beats in both tokens a second and time a token, slowest tokens first; tried: specs looked at."""

    best: Plan
    every: list[Plan]
    front: list[Plan]
    tried: int


class NoPlanError(ConfigError):
    """No split of the devices holds the model, or serves it as asked. latency: whether it is limits of latency that no
    plan meets."""

    def __init__(self, message: str, *, latency: bool = False) -> None:
        super().__init__(message)
        self.latency = latency


def search(question: Question) -> Found:
    """All specs, at all numbers of requests that may matter.

    Raises: NoPlanError, ConfigError naming what is asked and what is possible.
    """
    specs = list(specs_of(question))
    found = _priced(question, specs)
    if not found:
        raise NoPlanError(_no_room(question, specs))
    shown: list[Plan] = []
    # Other chunks of prompts, and numbers of requests between, only for what leads without.
    for spec in {
        plan.spec
        for plan in sorted(found, key=lambda plan: (not _meets(question, plan), value(question, plan)))[:_LEADING]
    }:
        for chunk in [question.chunk_tokens] if question.chunk_tokens else _CHUNKS:
            fine = replace(spec, chunk_tokens=chunk)
            serving = serving_of(question, fine)
            if serving is None:
                continue
            found += _plans(question, fine, serving, finely=True)
            if question.load.concurrency is None and question.objective == "latency":  # for the front alone
                shown += _plans(replace(question, objective="throughput"), fine, serving, finely=False)
    allowed = [plan for plan in found if _meets(question, plan)]
    if not allowed:
        raise NoPlanError(_out_of_reach(question, found), latency=True)
    best: dict[Spec, Plan] = {}
    for plan in sorted(allowed, key=lambda plan: value(question, plan)):
        best.setdefault(plan.spec, plan)
    every = list(best.values())
    return Found(
        best=_chosen(question, every),
        every=every,
        front=front_of([*allowed, *(plan for plan in shown if _meets(question, plan))]),
        tried=len(specs),
    )


def specs_of(question: Question) -> Iterator[Spec]:
    """Every way to split the model over the devices; those that place it alike once."""
    config, moe = question.config, question.config.moe is not None
    layouts = [question.layout] if question.layout else list(LAYOUTS.values())
    all_axes = [tuple(question.axes.items())] if question.axes else list(_all_axes(question.devices, config))
    seen: set[tuple[object, ...]] = set()
    for axes in all_axes:
        sizes = dict(axes)
        for layout in layouts:
            if not question.layout and not _worth(config, layout, sizes):
                continue
            for stage_chunks in _stage_chunks(question, sizes):
                for dispatch in _dispatches(question, _placement(question.hardware, axes, layout)):
                    means = (_meaning(axes, layout, moe, apart=dispatch in HIERARCHICAL), dispatch, stage_chunks)
                    if means not in seen:
                        seen.add(means)
                        yield Spec(
                            axes=axes, layout=layout, dispatch=dispatch, stage_chunks=stage_chunks,
                            chunk_tokens=question.chunk_tokens or _CHUNKS[1],
                        )  # fmt: skip


def _meaning(axes: tuple[tuple[str, int], ...], layout: Layout, moe: bool, *, apart: bool) -> tuple[object, ...]:
    """What the axes of a layout do, outermost first: neighbours that do the same are one, unless they are levels of
    an exchange (apart)."""
    found: list[tuple[object, int]] = []
    experts = (layout.experts, layout.expert_width) if moe else ()
    parts = (layout.batch, layout.split, layout.context, layout.sequence, *experts)
    for axis, size in axes:
        does = axis == "pipeline" or tuple(axis in part for part in parts)
        if size == 1:
            continue
        if found and found[-1][0] == does and not (apart and axis in layout.experts):
            size *= found.pop()[1]
        found.append((does, size))
    return tuple(found)


def _all_axes(devices: int, config: ModelConfig) -> Iterator[tuple[tuple[str, int], ...]]:
    """Sizes of data, pipeline, expert and tensor that multiply to the devices; without experts the expert axis would
    be another data axis."""
    for pipeline in _divisors(devices):
        if pipeline > min(config.num_hidden_layers, _MOST_STAGES):
            continue
        for tensor in [one for one in _divisors(devices // pipeline) if one <= _MOST_TENSOR]:
            rest = devices // pipeline // tensor
            for expert in _divisors(rest) if config.moe else [1]:
                sizes = {"data": rest // expert, "pipeline": pipeline, "expert": expert, "tensor": tensor}
                if config.moe is None or expert <= config.moe.num_experts:
                    yield tuple(sizes.items())


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _worth(config: ModelConfig, layout: Layout, sizes: Mapping[str, int]) -> bool:
    """Whether a layout splits heads no finer than there are any, and a context not too finely."""
    split = math.prod(sizes[axis] for axis in layout.split)
    context = math.prod(sizes[axis] for axis in layout.context)
    return split <= config.num_attention_heads and context <= 16


def _dispatches(question: Question, placement: Placement) -> Iterator[str]:
    """Those that differ, and that the hardware has."""
    exchanged = [axis for axis in placement.exchanged("residual") if placement.mesh.shape[axis] > 1]
    if question.dispatch:
        yield question.dispatch
        return
    yield "all_to_all"
    if question.config.moe is None or not exchanged:
        return
    kinds = ["all_gather", "ragged_all_to_all", *(HIERARCHICAL if len(exchanged) > 1 else ())]
    most = {"tpu": math.inf, "cuda": MOST_RAGGED_GPUS}.get(question.hardware.platform, 1)
    yield from (kind for kind in kinds if placement.ragged_peers(kind) <= most)


def _stage_chunks(question: Question, sizes: Mapping[str, int]) -> Iterable[int]:
    if question.stage_chunks:
        return [question.stage_chunks]
    return [1, 2] if sizes["pipeline"] > 1 else [1]


def _priced(question: Question, specs: list[Spec]) -> list[Plan]:
    """Plans of all specs but the hopeless: first without collectives, which is cheap and bounds what a spec can reach;
    then in that order, as long as the bound is near the best there is, and one of each sort of split all the same."""
    bounds: list[tuple[float, str, Serving, list[Spec]]] = []
    for alike, serving in servings_of(question, specs):
        silent = _plans(question, alike[0], serving.dispatched(SILENT), finely=False)
        bound = min((value(question, plan) for plan in silent if _meets(question, plan)), default=math.inf)
        bounds.append((bound, _sort_of(question, alike[0]), serving, alike))
    found: list[Plan] = []
    best, sorts = math.inf, set()
    for bound, sort, serving, alike in sorted(bounds, key=lambda item: item[0]):
        if bound > _HOPELESS * best and sort in sorts:
            continue
        sorts.add(sort)
        for spec in alike:
            plans = _plans(question, spec, serving.dispatched(spec.dispatch), finely=False)
            found += plans
            best = min([best, *(value(question, plan) for plan in plans if _meets(question, plan))])
    return found


def _sort_of(question: Question, spec: Spec) -> str:
    """A kind of split without its numbers, and whether layers are split between fabrics."""
    kind = re.sub(r"\d", "", kind_of(spec, moe=question.config.moe is not None))
    axes, domain = dict(spec.axes), question.hardware.scale_up_devices
    return f"{kind} {group_of(spec.layout.split, axes, domain).across > 1}"


def _plans(question: Question, spec: Spec, serving: Serving, *, finely: bool) -> list[Plan]:
    """One plan for each number of requests that may matter; finely: more of them."""
    most = serving.most_requests(question.load)
    return [
        Plan(spec=spec, served=serving.serve(question.load, count), serving=serving, most_requests=most)
        for count in _concurrencies(question, most, step=1 if finely else 5)
    ]


def kind_of(spec: Spec, *, moe: bool) -> str:
    """A split in the field's words: TP8 PP2, EP16, DP8."""
    sizes, layout = dict(spec.axes), spec.layout
    degree = {
        "TP": math.prod(sizes[axis] for axis in layout.split), "PP": sizes["pipeline"],
        "CP": math.prod(sizes[axis] for axis in layout.context),
        "EP": math.prod(sizes[axis] for axis in layout.experts) if moe else 1,
    }  # fmt: skip
    spread = [axis for axis in layout.batch if not (moe and axis in (*layout.experts, *layout.expert_width))]
    degree["DP"] = math.prod(sizes[axis] for axis in spread)
    return " ".join(f"{name}{size}" for name, size in degree.items() if size > 1) or "one device"


def servings_of(question: Question, specs: Iterable[Spec]) -> Iterator[tuple[list[Spec], Serving]]:
    """Specs that differ in dispatch alone, and what they can serve, by the first's; those that fit."""
    for _, same in groupby(specs, key=lambda spec: replace(spec, dispatch="")):
        alike = list(same)
        serving = serving_of(question, alike[0])
        if serving is not None:
            yield alike, serving


def serving_of(question: Question, spec: Spec) -> Serving | None:
    """What a spec can serve; None where it has too few layers for its stages, or too little memory for one request."""
    placement = _placement(question.hardware, spec.axes, spec.layout, chunks=spec.stage_chunks)
    try:
        held = Held(question.config, placement, kv_dtype=question.kv_dtype)
    except ConfigError:
        return None
    if held.weight_bytes >= question.hardware.hbm_bytes:
        return None
    cost = StepCost(held, question.hardware, dispatch=spec.dispatch, skew=question.skew)
    serving = Serving(cost, chunk_tokens=spec.chunk_tokens)
    return serving if serving.most_requests(question.load) >= 1 else None


def _placement(
    hardware: Hardware, axes: tuple[tuple[str, int], ...], layout: Layout, *, chunks: int = 1
) -> Placement:  # fmt: skip
    platform = "gpu" if hardware.platform in ("cuda", "rocm") else hardware.platform
    return Placement(mesh=cast("Mesh", PlannedMesh(dict(axes), platform)), layout=layout, chunks=chunks)


def _concurrencies(question: Question, most: int, *, step: int) -> list[int]:
    asked = question.load.concurrency
    if asked is None and question.objective == "latency" and question.tpot_limit is None:
        asked = LATENCY_REQUESTS * question.devices
    if asked is not None:
        return [asked] if asked <= most else []
    return [*(1 << power for power in range(0, most.bit_length(), step) if 1 << power < most), most]


def _meets(question: Question, plan: Plan) -> bool:
    return (question.ttft_limit is None or plan.served.ttft <= question.ttft_limit) and (
        question.tpot_limit is None or plan.served.tpot <= question.tpot_limit
    )


def value(question: Question, plan: Plan) -> float:
    """What the objective wants least of."""
    if question.objective == "latency":
        return plan.request_seconds
    return plan.devices / plan.tokens_a_second


def _chosen(question: Question, plans: list[Plan]) -> Plan:
    """Of the plans as good as the best: the best in what was not asked for (a token's time, or tokens a second), then
    the one that leans least on links between fabrics, then the plainest."""
    least = value(question, plans[0])
    alike = [plan for plan in plans if value(question, plan) <= least * (1 + ALIKE)]
    other = replace(question, objective="throughput" if question.objective == "latency" else "latency")
    best = min(value(other, plan) for plan in alike)
    alike = [plan for plan in alike if value(other, plan) <= best * (1 + ALIKE)]
    names = list(LAYOUTS.values())

    def plainness(plan: Plan) -> tuple[float, ...]:
        spec, turn = plan.spec, plan.served.turn
        return (
            round(turn.scale_out / turn.total, 2), sum(size > 1 for _, size in spec.axes), spec.stage_chunks,
            names.index(spec.layout) if spec.layout in names else 0, spec.dispatch != "all_to_all",
            value(question, plan),
        )  # fmt: skip

    return min(alike, key=plainness)


def front_of(plans: Iterable[Plan]) -> list[Plan]:
    """Plans that no other beats in both tokens a second of a device and time a token, the fastest for a user first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.served.tpot, -plan.tokens_a_second / plan.devices)):
        if not found or plan.tokens_a_second / plan.devices > found[-1].tokens_a_second / found[-1].devices:
            found.append(plan)
    return found


def _no_room(question: Question, specs: list[Spec]) -> str:
    """Why nothing fits, with numbers."""
    load, hardware = question.load, question.hardware
    held = []
    for spec in specs:
        place = _placement(hardware, spec.axes, spec.layout, chunks=spec.stage_chunks)
        try:
            held.append(Held(question.config, place).weight_bytes)
        except ConfigError:
            continue
    least = min(held, default=math.inf)
    many = f"{question.devices} x {hardware.device}" if question.devices > 1 else f"one {hardware.device}"
    has = f"a device has {hardware.hbm_gib:.1f} GiB"
    if least >= hardware.hbm_bytes:
        return f"{many}: the weights take at least {least / 2**30:.1f} GiB of every device, {has}"
    asked = "one request" if load.concurrency is None else f"{load.concurrency} requests"
    return (
        f"{many}: beside {least / 2**30:.1f} GiB of weights there is no room for {asked} of {load.isl + load.osl} "
        f"tokens; {has}"
    )


def _out_of_reach(question: Question, plans: list[Plan]) -> str:
    """What the best possible is, where limits of latency cannot be met."""
    limits = []
    if question.ttft_limit is not None:
        limits.append(f"--sla-ttft-ms {question.ttft_limit * 1e3:g}")
    if question.tpot_limit is not None:
        limits.append(f"--sla-tpot-ms {question.tpot_limit * 1e3:g}")
    first = min(plan.served.ttft for plan in plans) * 1e3
    token = min(plan.served.tpot for plan in plans) * 1e3
    return (
        f"{' with '.join(limits)} cannot be met by {question.devices} x {question.hardware.device}: the best time to "
        f"the first token is {first:,.1f} ms, the best time a token {token:,.2f} ms"
    )

"""Every split that some devices allow, priced: the best by an objective, the front of throughput against latency.

First all candidates without collectives, which is cheap and bounds what they can reach; then those near the best with
their collectives; then the leading ones at other chunks of prompts and more numbers of requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from jaxmoe.errors import ConfigError
from jaxmoe.planner.choose import (
    REL_TOLERANCE,
    ServingPlan,
    limited,
    meets,
    objective_value,
    order,
    pareto_front,
    select_best,
)
from jaxmoe.planner.cost import SILENT, StepCost
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import DeviceMemory
from jaxmoe.planner.serving import ServingModel, Workload
from jaxmoe.planner.specs import (
    CHUNKS,
    OBJECTIVES,
    Objective,
    ParallelismConfig,
    SearchRequest,
    candidates_of,
    kind_of,
    placement_of,
    why_none,
)

__all__ = [
    "OBJECTIVES",
    "REL_TOLERANCE",
    "NoPlanError",
    "Objective",
    "ParallelismConfig",
    "SearchRequest",
    "SearchResult",
    "ServingPlan",
    "Workload",
    "candidates_of",
    "kind_of",
    "objective_value",
    "search",
    "servings_of",
]

PlanFailure = Literal["room", "latency", "split"]
# Requests a device at once where the lowest latency is asked for and nobody says how many there are: halved while no
# split has room for them, or keeps the limits asked for.
LATENCY_REQUESTS = 4
# Candidates that would be so much worse than the best even without collectives are not priced with them.
_HOPELESS = 1.1
_LEADING = 12  # plans whose other options are looked at too


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """best: the plan chosen; every: one of each candidate that fits, for as many requests where a number was assumed,
    best first; front: plans that none beats in both tokens a second and time a token, slowest tokens last, `best` among
    them; tried: candidates looked at."""

    best: ServingPlan
    every: list[ServingPlan]
    front: list[ServingPlan]
    tried: int


class NoPlanError(ConfigError):
    """No split of the devices holds the model, keeps limits of latency, or is as asked: `lacks` says which.

    ttft, tpot: the least there are, where limits of latency are not kept; most: requests that have room, where those
    asked for have none.
    """

    def __init__(
        self, message: str, *, failure: PlanFailure, ttft: float = math.inf, tpot: float = math.inf, most: int = 0
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.failure, self.ttft, self.tpot, self.most = failure, ttft, tpot, most


def search(request: SearchRequest) -> SearchResult:
    """Price all candidates, at all numbers of requests that may matter.

    Raises: NoPlanError, ConfigError naming what is asked and what is possible.
    """
    candidates = list(candidates_of(request))
    if not candidates:
        raise NoPlanError(why_none(request), failure="split")
    plans = _priced(request, candidates)
    if not plans:
        raise NoPlanError(_no_room(request, candidates), failure="room", most=_max_requests(request))
    shown: list[ServingPlan] = []
    # Other chunks of prompts, and numbers of requests between, only for what leads without.
    leading = sorted(plans, key=lambda plan: (not meets(request, plan), order(request, plan)))
    for parallelism in dict.fromkeys(plan.parallelism for plan in leading[:_LEADING]):
        for fine, serving in _servings(
            request, parallelism, [request.chunk_tokens] if request.chunk_tokens else CHUNKS
        ):
            plans += _plans(request, fine, serving, finely=True)
            if request.workload.concurrency is None and (request.objective == "latency" or limited(request)):
                # For the front alone.
                free = replace(request, objective="throughput", ttft_limit=None, tpot_limit=None)
                shown += _plans(free, fine, serving, finely=True)
    allowed = [plan for plan in plans if meets(request, plan)]
    if not allowed:
        raise _out_of_reach(request, plans)
    best = select_best(request, allowed)
    by_parallelism: dict[ParallelismConfig, ServingPlan] = {}
    for plan in sorted(allowed, key=lambda plan: order(request, plan)):
        if order(request, plan)[0] == order(request, best)[0]:
            by_parallelism.setdefault(plan.parallelism, plan)
    return SearchResult(
        best=best,
        every=list(by_parallelism.values()),
        front=pareto_front([*allowed, *(plan for plan in shown if meets(request, plan))], best=best),
        tried=len(candidates),
    )


def _priced(request: SearchRequest, candidates: list[ParallelismConfig]) -> list[ServingPlan]:
    """Plans of all candidates but the hopeless: first without collectives, which is cheap and bounds what one can
    reach; then in that order, as long as the bound is near the best there is, and one of each sort of split
    all the same."""
    worst = (1, math.inf)
    bounds: list[tuple[tuple[int, float], str, ServingModel, list[ParallelismConfig]]] = []
    for alike, serving in servings_of(request, candidates):
        silent = _plans(request, alike[0], serving.dispatched(SILENT), finely=False, fully=True)
        bound = min((order(request, plan) for plan in silent if meets(request, plan)), default=worst)
        bounds.append((bound, _sort_of(request, alike[0]), serving, alike))
    priced: list[ServingPlan] = []
    best, sorts = worst, set()
    for bound, sort, serving, alike in sorted(bounds, key=lambda item: item[0]):
        if bound > (best[0], _HOPELESS * best[1]) and sort in sorts:
            continue
        sorts.add(sort)
        for parallelism in alike:
            plans = _plans(request, parallelism, serving.dispatched(parallelism.dispatch), finely=False)
            priced += plans
            best = min([best, *(order(request, plan) for plan in plans if meets(request, plan))])
    return priced


def _sort_of(request: SearchRequest, parallelism: ParallelismConfig) -> str:
    """A kind of split without its numbers, and whether layers are split between fabrics."""
    kind = re.sub(r"\d", "", kind_of(parallelism, moe=request.config.moe is not None))
    axes, domain = dict(parallelism.axes), request.hardware.scale_up_devices
    return f"{kind} {group_of(parallelism.layout.split, axes, domain).across > 1}"


def _plans(
    request: SearchRequest, parallelism: ParallelismConfig, serving: ServingModel, *, finely: bool, fully: bool = False
) -> list[ServingPlan]:  # fmt: skip
    """Plans for the numbers of requests that may matter; finely: for more of them. fully: of those for throughput the
    largest two, which are the best where requests say nothing to each other."""
    most, workload = serving.max_requests(request.workload), request.workload

    def plan(count: int) -> ServingPlan:
        return ServingPlan(
            parallelism=parallelism, estimate=serving.estimate(workload, count), serving=serving, max_requests=most
        )

    if workload.concurrency is not None:
        return [plan(workload.concurrency)]
    if request.objective == "latency":
        assumed = LATENCY_REQUESTS * request.devices
        counts = [assumed >> halved for halved in range(assumed.bit_length()) if assumed >> halved <= most]
        return _down_to_limits(request, plan, counts)
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    if limited(request):
        down = _down_to_limits(request, plan, [most, *reversed(powers)])
        return down + _between(request, plan, down, finely=finely)
    if finely:
        powers = sorted({*powers, *(3 * power for power in powers if 3 * power < most)})
    counts = [*(powers if finely else powers[::5]), most]
    return [plan(count) for count in (counts[-2:] if fully else counts)]


def _down_to_limits(request: SearchRequest, plan: Callable[[int], ServingPlan], counts: list[int]) -> list[ServingPlan]:
    """Plans of ever fewer requests, to the first that keeps limits of latency."""
    plans: list[ServingPlan] = []
    for count in counts:
        plans.append(plan(count))
        if meets(request, plans[-1]):
            break
    return plans


def _between(
    request: SearchRequest, plan: Callable[[int], ServingPlan], down: list[ServingPlan], *, finely: bool
) -> list[ServingPlan]:
    """Plans of more requests than the last of `down`, which keeps the limits, and fewer than the one before."""
    plans: list[ServingPlan] = []
    if len(down) < 2 or not meets(request, down[-1]):
        return plans
    above, below = (one.estimate.concurrency for one in down[-2:])
    while above - below > max(1, below >> (5 if finely else 2)):
        plans.append(plan((above + below) // 2))
        if meets(request, plans[-1]):
            below = plans[-1].estimate.concurrency
        else:
            above = plans[-1].estimate.concurrency
    return plans


def servings_of(
    request: SearchRequest, candidates: Iterable[ParallelismConfig]
) -> Iterator[tuple[list[ParallelismConfig], ServingModel]]:
    """Candidates that differ in dispatch alone, and what they can serve, by the first's; those that have room for the
    requests, where the first chunk of prompts leaves too little by the smallest."""
    for _, same in groupby(candidates, key=lambda parallelism: replace(parallelism, dispatch="")):
        alike = list(same)
        first = alike[0].chunk_tokens
        fitting = _servings(request, alike[0], [first, *([] if request.chunk_tokens else [min(CHUNKS)])])
        for parallelism, serving in fitting:
            yield [replace(one, chunk_tokens=parallelism.chunk_tokens) for one in alike], serving
            break


def _servings(
    request: SearchRequest, parallelism: ParallelismConfig, chunks: Iterable[int]
) -> Iterator[tuple[ParallelismConfig, ServingModel]]:
    """What a candidate can serve with each of these chunks of prompts; with none where it has too few layers for
    its stages, or too little memory for the requests (of an unknown number for one)."""
    placement = placement_of(
        request.hardware, parallelism.axes, parallelism.layout, virtual_stages=parallelism.virtual_stages
    )
    try:
        memory = DeviceMemory(request.config, placement, kv_dtype=request.kv_dtype)
    except ConfigError:
        return
    if memory.weight_bytes >= request.hardware.hbm_bytes:
        return
    cost = StepCost(memory, request.hardware, dispatch=parallelism.dispatch, skew=request.skew)
    for chunk in chunks:
        serving = ServingModel(cost, chunk_tokens=chunk)
        if serving.max_requests(request.workload) >= (request.workload.concurrency or 1):
            yield replace(parallelism, chunk_tokens=chunk), serving


def _max_requests(request: SearchRequest) -> int:
    """Those that any candidate has room for, with the smallest chunks of prompts; 0 where nobody said how many."""
    if request.workload.concurrency is None:
        return 0
    workload = replace(request.workload, concurrency=None)
    free = replace(request, workload=workload, chunk_tokens=request.chunk_tokens or min(CHUNKS))
    return max((serving.max_requests(workload) for _, serving in servings_of(free, candidates_of(free))), default=0)


def _no_room(request: SearchRequest, candidates: list[ParallelismConfig]) -> str:
    """Why nothing fits, with numbers."""
    workload, hardware = request.workload, request.hardware
    weight_bytes: list[int] = []
    error: ConfigError | None = None
    for parallelism in candidates:
        placement = placement_of(
            hardware, parallelism.axes, parallelism.layout, virtual_stages=parallelism.virtual_stages
        )
        try:
            weight_bytes.append(DeviceMemory(request.config, placement).weight_bytes)
        except ConfigError as cannot:
            error = error or cannot
    if error is not None and not weight_bytes:  # it is not for lack of room
        raise error
    least = min(weight_bytes)
    many = f"{request.devices} x {hardware.device}" if request.devices > 1 else f"one {hardware.device}"
    has = f"a device has {hardware.hbm_gib:.1f} GiB"
    if least >= hardware.hbm_bytes:
        return f"{many}: the weights take at least {least / 2**30:.1f} GiB of every device, {has}"
    requests = "one request" if workload.concurrency in (None, 1) else f"{workload.concurrency} requests"
    return (
        f"{many}: beside {least / 2**30:.1f} GiB of weights there is no room for {requests} "
        f"of {workload.isl + workload.osl} "
        f"tokens; {has}"
    )


def _out_of_reach(request: SearchRequest, plans: list[ServingPlan]) -> NoPlanError:
    """With what the best possible is, where limits of latency cannot be met."""
    ttft, tpot = min(plan.estimate.ttft for plan in plans), min(plan.estimate.tpot for plan in plans)
    devices = f"{request.devices} x {request.hardware.device}"
    return NoPlanError(missed(request, devices, ttft=ttft, tpot=tpot), failure="latency", ttft=ttft, tpot=tpot)


def missed(request: SearchRequest, devices: str, *, ttft: float, tpot: float) -> str:
    """That limits cannot be met, beside the best there is of each that was asked for."""
    limits, best = [], []
    if request.ttft_limit is not None:
        limits.append(f"--sla-ttft-ms {request.ttft_limit * 1e3:g}")
        best.append(f"the best time to the first token is {ttft * 1e3:,.1f} ms")
    if request.tpot_limit is not None:
        limits.append(f"--sla-tpot-ms {request.tpot_limit * 1e3:g}")
        best.append(f"the best time a token is {tpot * 1e3:,.2f} ms")
    each = ", each by itself" * (len(best) > 1)
    return f"{' with '.join(limits)} cannot be met by {devices}: {', '.join(best)}{each}"

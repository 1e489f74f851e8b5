"""Search all splits of a model over a number of devices for the best plan by an objective, and the Pareto front.

The search has three passes. The first estimates all candidates without collectives, which is cheap and bounds their
performance. The second estimates candidates near the best with their collectives. The third varies the chunk size of
prompts and the concurrency of the leading candidates.
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
    ServingPlan,
    limited,
    meets,
    order,
    pareto_front,
    select_best,
)
from jaxmoe.planner.cost import SILENT, StepCost
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import DeviceMemory
from jaxmoe.planner.serving import ServingModel
from jaxmoe.planner.specs import (
    CHUNKS,
    ParallelismConfig,
    SearchRequest,
    candidates_of,
    kind_of,
    placement_of,
    why_none,
)

PlanFailure = Literal["room", "latency", "split"]
# Concurrent requests per device, assumed for objective "latency" without a given concurrency. Halved until a split has
# room for them and meets the latency limits.
LATENCY_REQUESTS = 4
# Candidates worse than the best by this factor even without collectives are not estimated with them.
_HOPELESS = 1.1
_LEADING = 12  # plans tried with other chunk sizes and concurrencies


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hold the result of a search.

    best: the selected plan. every: the best plan of each candidate that fits, best first; if the search assumed a
    concurrency, only plans with that of `best`. front: the Pareto front of throughput per device and time per token,
    lowest time first, including `best`. tried: number of candidates.
    """

    best: ServingPlan
    every: list[ServingPlan]
    front: list[ServingPlan]
    tried: int


class NoPlanError(ConfigError):
    """Report that no split of the devices fits (failure="room"), meets the latency limits or matches the request.

    failure: "room", "latency" or "split". ttft, tpot: the lowest possible seconds, if the latency limits cannot be met.
    most: concurrent requests that would fit, if the requested number does not.
    """

    def __init__(
        self, message: str, *, failure: PlanFailure, ttft: float = math.inf, tpot: float = math.inf, most: int = 0
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.failure, self.ttft, self.tpot, self.most = failure, ttft, tpot, most


def search(request: SearchRequest) -> SearchResult:
    """Return the best plan of all candidates, over all concurrencies that may matter.

    Raises: NoPlanError, ConfigError naming the request and the limits of what is possible.
    """
    candidates = list(candidates_of(request))
    if not candidates:
        raise NoPlanError(why_none(request), failure="split")
    plans = _priced(request, candidates)
    if not plans:
        raise NoPlanError(_no_room(request, candidates), failure="room", most=_max_requests(request))
    shown: list[ServingPlan] = []
    # Try other chunk sizes and intermediate concurrencies only for the leading candidates.
    leading = sorted(plans, key=lambda plan: (not meets(request, plan), order(request, plan)))
    for parallelism in dict.fromkeys(plan.parallelism for plan in leading[:_LEADING]):
        for fine, serving in _servings(
            request, parallelism, [request.chunk_tokens] if request.chunk_tokens else CHUNKS
        ):
            plans += _plans(request, fine, serving, finely=True)
            if request.workload.concurrency is None and (request.objective == "latency" or limited(request)):
                # Only the Pareto front needs these.
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
    """Return plans of the candidates with a bound near the best plan, and of the first candidate of each sort of split.

    The bound is the estimate without collectives, which is cheap. Candidates are estimated in the order of their
    bounds.
    """
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
    """Return the kind of split without degrees, and whether tensor parallelism spans scale-up domains."""
    kind = re.sub(r"\d", "", kind_of(parallelism, moe=request.config.moe is not None))
    axes, domain = dict(parallelism.axes), request.hardware.scale_up_devices
    return f"{kind} {group_of(parallelism.layout.split, axes, domain).across > 1}"


def _plans(
    request: SearchRequest, parallelism: ParallelismConfig, serving: ServingModel, *, finely: bool, fully: bool = False
) -> list[ServingPlan]:  # fmt: skip
    """Return plans for the concurrencies that may matter.

    finely: try more concurrencies. fully: for throughput, try only the two largest, which are the best without
    collectives.
    """
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
    """Return plans with decreasing concurrency, up to the first that meets the latency limits."""
    plans: list[ServingPlan] = []
    for count in counts:
        plans.append(plan(count))
        if meets(request, plans[-1]):
            break
    return plans


def _between(
    request: SearchRequest, plan: Callable[[int], ServingPlan], down: list[ServingPlan], *, finely: bool
) -> list[ServingPlan]:
    """Return plans between the last of `down`, if it meets the latency limits, and the one before, by bisection."""
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
    """Yield groups of candidates that differ only in dispatch, each with the serving model of its first one.

    Candidates without room for the requests are omitted. If the first chunk size leaves too little memory, the smallest
    is used, unless the request fixes it.
    """
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
    """Yield the serving model of a candidate for each chunk size with enough memory for the requests.

    Yields nothing if the pipeline has more stages than layers or the weights do not fit. Without a given concurrency,
    memory for one request is enough.
    """
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
    """Return the most requests that any candidate fits, with the smallest chunks; 0 without a given concurrency."""
    if request.workload.concurrency is None:
        return 0
    workload = replace(request.workload, concurrency=None)
    free = replace(request, workload=workload, chunk_tokens=request.chunk_tokens or min(CHUNKS))
    return max((serving.max_requests(workload) for _, serving in servings_of(free, candidates_of(free))), default=0)


def _no_room(request: SearchRequest, candidates: list[ParallelismConfig]) -> str:
    """Return why no candidate fits, with the memory it needs and the memory of a device."""
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
    if error is not None and not weight_bytes:  # the cause is not memory
        raise error
    least = min(weight_bytes)
    many = f"{request.devices} x {hardware.device}" if request.devices > 1 else f"one {hardware.device}"
    has = f"a device has {hardware.hbm_gib:.1f} GiB"
    if least >= hardware.hbm_bytes:
        return f"{many}: the weights take at least {least / 2**30:.1f} GiB of every device, {has}"
    requests = "one request" if workload.concurrency in (None, 1) else f"{workload.concurrency} requests"
    return (
        f"{many}: with {least / 2**30:.1f} GiB of weights per device there is no room for {requests} "
        f"of {workload.isl + workload.osl} "
        f"tokens; {has}"
    )


def _out_of_reach(request: SearchRequest, plans: list[ServingPlan]) -> NoPlanError:
    """Return the error for latency limits that cannot be met, with the lowest possible TTFT and TPOT."""
    ttft, tpot = min(plan.estimate.ttft for plan in plans), min(plan.estimate.tpot for plan in plans)
    devices = f"{request.devices} x {request.hardware.device}"
    return NoPlanError(missed(request, devices, ttft=ttft, tpot=tpot), failure="latency", ttft=ttft, tpot=tpot)


def missed(request: SearchRequest, devices: str, *, ttft: float, tpot: float) -> str:
    """Return the message that latency limits cannot be met, with the lowest possible value of each."""
    limits, best = [], []
    if request.ttft_limit is not None:
        limits.append(f"--sla-ttft-ms {request.ttft_limit * 1e3:g}")
        best.append(f"the lowest TTFT is {ttft * 1e3:,.1f} ms")
    if request.tpot_limit is not None:
        limits.append(f"--sla-tpot-ms {request.tpot_limit * 1e3:g}")
        best.append(f"the lowest TPOT is {tpot * 1e3:,.2f} ms")
    each = ", each by itself" * (len(best) > 1)
    return f"{' with '.join(limits)} cannot be met by {devices}: {', '.join(best)}{each}"

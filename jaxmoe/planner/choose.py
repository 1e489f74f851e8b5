"""Which plan is the best, of those as good as the best, and which are the front of throughput against latency."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxmoe.parallel.layouts import LAYOUTS
from jaxmoe.planner.serving import ServingEstimate, ServingModel
from jaxmoe.planner.specs import ParallelismConfig, SearchRequest

# Plans whose values lie so near are as good as each other: prices are not that exact.
REL_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """A parallelism config that fits, and what it serves at one concurrency. Bytes are one device's."""

    parallelism: ParallelismConfig
    estimate: ServingEstimate
    serving: ServingModel
    max_requests: int

    @property
    def tokens_per_s(self) -> float:
        """Generated, over all devices."""
        return self.estimate.tokens_per_s

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(size for _, size in self.parallelism.axes)

    @property
    def request_seconds(self) -> float:
        """From a request's arrival to its last token."""
        return self.estimate.request_seconds

    @property
    def osl(self) -> int:
        """Tokens each request generates."""
        return self.estimate.osl


def limited(request: SearchRequest) -> bool:
    """Whether a limit of latency was asked for."""
    return request.ttft_limit is not None or request.tpot_limit is not None


def meets(request: SearchRequest, plan: ServingPlan) -> bool:
    """Whether a plan keeps the limits of latency."""
    return (request.ttft_limit is None or plan.estimate.ttft <= request.ttft_limit) and (
        request.tpot_limit is None or plan.estimate.tpot <= request.tpot_limit
    )


def objective_value(request: SearchRequest, plan: ServingPlan) -> float:
    """What the objective wants least of."""
    if request.objective == "latency":
        return plan.request_seconds
    return plan.devices / plan.tokens_per_s


def order(request: SearchRequest, plan: ServingPlan) -> tuple[int, float]:
    """By what plans are sorted, the best first. Where the lowest latency is asked for and nobody says of how many
    requests, fewer of them come later: of one request alone all latencies are low."""
    assumed = request.objective == "latency" and request.workload.concurrency is None
    return (-plan.estimate.concurrency if assumed else 0, objective_value(request, plan))


def select_best(request: SearchRequest, plans: list[ServingPlan]) -> ServingPlan:
    """Of the plans as good as the best: the best in what was not asked for (a request's time, or tokens a second), then
    the one that leans least on links between fabrics, then the plainest."""
    first, least = min(order(request, plan) for plan in plans)
    alike = [plan for plan in plans if order(request, plan) <= (first, least * (1 + REL_TOLERANCE))]
    other = replace(request, objective="throughput" if request.objective == "latency" else "latency")
    best = min(objective_value(other, plan) for plan in alike)
    alike = [plan for plan in alike if objective_value(other, plan) <= best * (1 + REL_TOLERANCE)]
    names = list(LAYOUTS.values())

    def plainness(plan: ServingPlan) -> tuple[float, ...]:
        parallelism, mean_step = plan.parallelism, plan.estimate.mean_step
        return (
            round(mean_step.scale_out / mean_step.total, 2), sum(size > 1 for _, size in parallelism.axes),
            parallelism.virtual_stages,
            names.index(parallelism.layout) if parallelism.layout in names else 0, parallelism.dispatch != "all_to_all",
            objective_value(request, plan),
        )  # fmt: skip

    return min(alike, key=plainness)


def pareto_front(plans: Iterable[ServingPlan], *, best: ServingPlan) -> list[ServingPlan]:
    """Plans that no other beats in both tokens a second of a device and time a token, the fastest for a user first, and
    `best` in place of those as good as it. Of plans as good that differ in the tokens of a chunk alone, one."""
    front: list[ServingPlan] = []
    for plan in sorted(plans, key=lambda plan: (plan.estimate.seconds_per_token, -_each(plan))):
        if not front or _each(plan) > _each(front[-1]):
            front.append(plan)
    if best not in front:
        front = [
            one
            for one in front
            if one.estimate.seconds_per_token > best.estimate.seconds_per_token or _each(one) < _each(best)
        ]
        front.append(best)
    shown: list[ServingPlan] = [best]
    for plan in sorted(front, key=lambda plan: plan.estimate.seconds_per_token / _each(plan)):
        if plan is not best and not any(_doubles(plan, one) for one in shown):
            shown.append(plan)
    return sorted(shown, key=lambda plan: plan.estimate.seconds_per_token)


def _each(plan: ServingPlan) -> float:
    """Tokens a second of a device."""
    return plan.tokens_per_s / plan.devices


def _doubles(plan: ServingPlan, other: ServingPlan) -> bool:
    """Whether plans that differ in the tokens of a chunk alone are as good as each other."""
    if replace(plan.parallelism, chunk_tokens=0) != replace(other.parallelism, chunk_tokens=0):
        return False
    ratios = plan.estimate.seconds_per_token / other.estimate.seconds_per_token, _each(plan) / _each(other)
    return plan.parallelism != other.parallelism and all(
        1 / (1 + REL_TOLERANCE) <= ratio <= 1 + REL_TOLERANCE for ratio in ratios
    )

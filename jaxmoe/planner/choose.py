"""Select the best plan, with tie-breaking among equally good ones, and the Pareto front of throughput and latency."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxmoe.parallel.layouts import LAYOUTS
from jaxmoe.planner.serving import ServingEstimate, ServingModel
from jaxmoe.planner.specs import ParallelismConfig, SearchRequest

# Relative difference up to which plans count as equally good: the estimates are not more accurate.
REL_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """Hold a parallelism config that fits, with its estimated serving performance at one concurrency.

    max_requests: the most concurrent requests that fit, over all devices.
    """

    parallelism: ParallelismConfig
    estimate: ServingEstimate
    serving: ServingModel
    max_requests: int

    @property
    def tokens_per_s(self) -> float:
        """Return generated tokens per second, over all devices."""
        return self.estimate.tokens_per_s

    @property
    def devices(self) -> int:
        """Return the number of devices of the mesh."""
        return math.prod(size for _, size in self.parallelism.axes)

    @property
    def request_seconds(self) -> float:
        """Return the seconds from a request's arrival to its last token."""
        return self.estimate.request_seconds

    @property
    def osl(self) -> int:
        """Return the number of tokens that each request generates (OSL)."""
        return self.estimate.osl


def limited(request: SearchRequest) -> bool:
    """Return whether the request has a latency limit (TTFT or TPOT)."""
    return request.ttft_limit is not None or request.tpot_limit is not None


def meets(request: SearchRequest, plan: ServingPlan) -> bool:
    """Return whether a plan meets the latency limits of the request."""
    return (request.ttft_limit is None or plan.estimate.ttft <= request.ttft_limit) and (
        request.tpot_limit is None or plan.estimate.tpot <= request.tpot_limit
    )


def objective_value(request: SearchRequest, plan: ServingPlan) -> float:
    """Return the number that the objective minimizes.

    Seconds per request for "latency", else device seconds per generated token.
    """
    if request.objective == "latency":
        return plan.request_seconds
    return plan.devices / plan.tokens_per_s


def order(request: SearchRequest, plan: ServingPlan) -> tuple[int, float]:
    """Return the sort key of a plan; the best plan has the least key.

    With objective "latency" and no given concurrency, plans with more concurrent requests sort first. Otherwise plans
    with a single request, which always has a low latency, would win.
    """
    assumed = request.objective == "latency" and request.workload.concurrency is None
    return (-plan.estimate.concurrency if assumed else 0, objective_value(request, plan))


def select_best(request: SearchRequest, plans: list[ServingPlan]) -> ServingPlan:
    """Return the best plan by the objective, breaking ties within REL_TOLERANCE.

    Among equally good plans, select by the other objective (throughput for "latency", else latency), then by the least
    share of time on links between scale-up domains, then by the simplest split.
    """
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
    """Return the plans that no other plan beats in both throughput per device and time per token.

    The lowest time per token comes first. `best` is always included; it replaces plans that beat it in both, which they
    do within the tolerance only. Equally good plans that differ only in chunk_tokens are listed once.
    """
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
    """Return tokens per second per device."""
    return plan.tokens_per_s / plan.devices


def _doubles(plan: ServingPlan, other: ServingPlan) -> bool:
    """Return whether two plans differ only in chunk_tokens and are equally good in latency and throughput."""
    if replace(plan.parallelism, chunk_tokens=0) != replace(other.parallelism, chunk_tokens=0):
        return False
    ratios = plan.estimate.seconds_per_token / other.estimate.seconds_per_token, _each(plan) / _each(other)
    return plan.parallelism != other.parallelism and all(
        1 / (1 + REL_TOLERANCE) <= ratio <= 1 + REL_TOLERANCE for ratio in ratios
    )

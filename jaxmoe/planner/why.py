"""Explain a plan in sentences. Each sentence cites a number from the search; no rule depends on a model's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxmoe.planner.choose import REL_TOLERANCE, ServingPlan, limited, objective_value
from jaxmoe.planner.improvements import improvements
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import KV_ITEMSIZES
from jaxmoe.planner.pools import DisaggregatedPlan, beats
from jaxmoe.planner.search import SearchResult
from jaxmoe.planner.sizes import behind_windows, behind_words
from jaxmoe.planner.specs import SearchRequest, kind_of

_BOTTLENECKS = {
    "compute": "matmuls", "memory": "reading weights and KV cache from memory", "link": "collectives inside a {fabric}",
    "scale_out": "collectives between {fabric}s", "launch": "kernel launches", "bubble": "pipeline bubbles",
}  # fmt: skip
_NOTHING = f"No change to the request improves it by more than {REL_TOLERANCE:.0%}."
# The requirement that a number of devices fails: memory for the model, memory for the requests, the latency limits.
UnmetLimit = Literal["model", "requests", "limits"]


@dataclass(frozen=True, kw_only=True)
class NeighborPlans:
    """Hold the best plans for half and twice the devices, None if not searched or not possible.

    half_unmet: the requirement that half the devices fail.
    """

    half: ServingPlan | None
    twice: ServingPlan | None
    half_unmet: UnmetLimit | None = None


def reasons(
    request: SearchRequest, result: SearchResult, disaggregated: DisaggregatedPlan | None, neighbors: NeighborPlans
) -> list[str]:
    """Return sentences that explain the plan: its bottleneck, improvements, memory, and other splits and sizes."""
    return [
        *_bottleneck(request, result.best, neighbors), *_approximated(request), *_memory(request, result.best),
        *_tensor(request, result), *_across(request, result), *_others(request, result),
        *_disaggregated(request, result.best, disaggregated), *_size(request, result.best, neighbors),
    ]  # fmt: skip


def counted(number: int, word: str) -> str:
    """Format a number with its noun: 1 request, 2 requests."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def digits(number: float) -> str:
    """Format a number as an integer from 100 on, with three significant digits below."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}" if seconds >= 1 else f"{seconds:.3g}"


def _bottleneck_words(request: SearchRequest, name: str) -> str:
    return _BOTTLENECKS[name].format(fabric=request.hardware.fabric)


def _bottleneck(request: SearchRequest, best: ServingPlan, neighbors: NeighborPlans) -> Iterator[str]:
    mean_step, twice = best.estimate.mean_step, neighbors.twice
    parts = sorted(mean_step.parts().items(), key=lambda item: -item[1])
    (first, most), (second, next_most) = parts[:2]
    then = f"; then {_bottleneck_words(request, second)}, {next_most / mean_step.total:.0%}" if next_most else ""
    more = twice is not None and objective_value(request, twice) < (1 - REL_TOLERANCE) * objective_value(request, best)
    changes = improvements(request, best, first, more_devices=more)
    advice = f"To improve: {'; or '.join(changes)}." if changes else _NOTHING
    yield (
        f"Bottleneck: {_bottleneck_words(request, first)}, {most / mean_step.total:.0%} of the mean step of "
        f"{mean_step.total * 1e3:.1f} ms"
        f"{then}. {advice}"
    )


def _approximated(request: SearchRequest) -> Iterator[str]:
    """Yield a warning if attention with an indexer is estimated as dense attention."""
    indexer = request.config.indexer
    if indexer is not None:
        met = f"{request.workload.isl + request.workload.osl:,}"
        yield (
            f"Estimated as dense latent attention: a token attends to all of up to {met} previous tokens, not to the "
            f"{indexer.top_k:,} that its indexer selects; the indexer's own weights, matmuls and cache are not counted."
        )


def _memory(request: SearchRequest, best: ServingPlan) -> Iterator[str]:
    memory, hardware = best.serving.device_memory, request.hardware
    share, tokens = memory.weight_bytes / hardware.hbm_bytes, request.workload.isl + request.workload.osl
    yield (
        f"Weights take {memory.weight_bytes / 2**30:.1f} of the {hardware.hbm_gib:.1f} GiB of a device ({share:.0%}); "
        f"the KV cache has room for {counted(best.max_requests, 'request')} of {tokens:,} tokens at once."
    )
    config, (item, scale) = request.config, KV_ITEMSIZES[memory.kv_dtype]
    each = [config.num_key_value_heads * cache_spec.bytes_per_head(item, scale) for cache_spec in config.cache_specs]
    layer_bytes = sum(each) / len(each)
    behind = behind_windows(config, tokens, chunk_tokens=best.serving.chunk_tokens, num_bytes=layer_bytes)
    if behind is not None:
        yield behind_words(behind)


def _spans(request: SearchRequest, plan: ServingPlan, axes: tuple[str, ...]) -> int:
    """Return the number of scale-up domains that groups along the axes span."""
    return group_of(axes, dict(plan.parallelism.axes), request.hardware.scale_up_devices).across


def _tensor(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """Compare the plan with tensor parallelism across scale-up domains, if there are several."""
    best, fabric = result.best, request.hardware.fabric
    if request.devices <= request.hardware.scale_up_devices:
        return
    outside = [plan for plan in result.every if _spans(request, plan, plan.parallelism.layout.split) > 1]
    if _spans(request, best, best.parallelism.layout.split) > 1:
        yield f"Tensor parallelism spans {fabric}s: no other split is better by more than {REL_TOLERANCE:.0%}."
    elif outside:
        other = min(outside, key=lambda plan: objective_value(request, plan))
        verdict = f"; {_as_good(request, other, best)}" if _alike(request, other, best) else ""
        theirs, here = _part(other, best, "scale_out")
        yield (
            f"No tensor parallelism across {fabric}s: the best plan with tensor parallelism across {fabric}s "
            f"({_named(request, other)}) {_compared(request, other, best)}; its collectives between {fabric}s take "
            f"{theirs}, {here} in this plan{verdict}."
        )


def _across(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """Describe the traffic between scale-up domains."""
    best, hardware = result.best, request.hardware
    fabric = hardware.fabric
    if request.devices <= hardware.scale_up_devices:
        if request.devices > 1:
            yield f"All {request.devices} devices are in one scale-up domain: no traffic crosses slower links."
        return
    sizes, fabrics = dict(best.parallelism.axes), math.ceil(request.devices / hardware.scale_up_devices)
    crossing = [axis for axis, size in sizes.items() if size > 1 and _spans(request, best, (axis,)) > 1]
    experts = best.parallelism.layout.experts if request.config.moe else ()
    if any(axis in experts for axis in crossing):
        across = _spans(request, best, experts)
        every = "both" if fabrics == 2 else f"all {fabrics}"
        where = f"{every} {fabric}s," if across >= fabrics else f"{across} of {fabrics} {fabric}s,"
        rest = "" if across >= fabrics else "; the rest hold replicas of them"
        yield (
            f"Experts are sharded over {where} so that a device reads fewer experts per step and each expert serves "
            f"more tokens{rest}; collectives between {fabric}s take "
            f"{best.estimate.mean_step.scale_out * 1e3:.1f} ms of a "
            f"step."
        )
    elif "pipeline" in crossing:
        yield (
            f"Pipeline stages span {fabric}s: each micro-batch sends its hidden states from stage to stage, "
            f"{best.estimate.mean_step.scale_out * 1e3:.2f} ms of a step."
        )
    elif crossing == ["data"]:
        yield (
            f"Every replica fits in one {fabric} and no traffic crosses: multi-{fabric} parallelism is not needed yet, "
            f"{fabrics} {fabric}s serve {request.devices / hardware.scale_up_devices:.3g} times as much as one."
        )


def _others(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """Compare the plan with the best plan of each other kind of split, up to three."""
    moe, best = request.config.moe is not None, result.best
    seen = {kind_of(best.parallelism, moe=moe)}
    for plan in sorted(result.every, key=lambda plan: objective_value(request, plan)):
        kind = kind_of(plan.parallelism, moe=moe)
        if kind in seen or len(seen) == 4:
            continue
        seen.add(kind)
        if _alike(request, plan, best):
            verdict = f"; {_as_good(request, plan, best)}"
        else:
            name = max(
                plan.estimate.mean_step.parts(),
                key=lambda name: _seconds_per_token(plan, name) - _seconds_per_token(best, name),
            )
            theirs, here = _part(plan, best, name)
            verdict = f"; {theirs} go to {_bottleneck_words(request, name)}, {here} in this plan"
        yield (
            f"Alternative {kind} ({plan.parallelism.mesh}, {plan.parallelism.layout}) "
            f"{_compared(request, plan, best)}{verdict}."
        )


def _alike(request: SearchRequest, plan: ServingPlan, best: ServingPlan) -> bool:
    return objective_value(request, plan) <= (1 + REL_TOLERANCE) * objective_value(request, best)


def _as_good(request: SearchRequest, plan: ServingPlan, best: ServingPlan) -> str:
    """Return why the best plan was preferred to an equally good one."""
    seconds, tokens = (one.request_seconds for one in (plan, best)), (_each(plan), _each(best))
    theirs, mine = seconds
    leaned = [one.estimate.mean_step.scale_out / one.estimate.mean_step.total for one in (plan, best)]
    if request.objective != "latency" and mine < theirs:
        why = f"a request takes {_seconds(mine)} s in it and {_seconds(theirs)} s in the other"
    elif request.objective == "latency" and tokens[1] > (1 + REL_TOLERANCE) * tokens[0]:
        why = f"it serves {digits(tokens[1])} tokens/s per device and the other {digits(tokens[0])}"
    elif leaned[1] < leaned[0]:
        why = f"it spends {leaned[1]:.1%} of a step between {request.hardware.fabric}s and the other {leaned[0]:.1%}"
    else:
        why = "its axes and options are simpler"
    return f"as good on paper; the chosen plan was preferred because {why}"


def _seconds_per_token(plan: ServingPlan, name: str) -> float:
    """Return the seconds of one bottleneck per generated token."""
    estimate = plan.estimate
    return estimate.mean_step.parts()[name] * estimate.num_steps / (estimate.concurrency * estimate.osl)


def _part(plan: ServingPlan, best: ServingPlan, name: str) -> tuple[str, str]:
    """Format one bottleneck's time in both plans: per step at equal concurrency, else per generated token."""
    if plan.estimate.concurrency == best.estimate.concurrency:
        theirs, here = (one.estimate.mean_step.parts()[name] * 1e3 for one in (plan, best))
        return f"{theirs:.1f} ms of a step", f"{here:.1f}"
    theirs, here = (_seconds_per_token(one, name) * 1e6 for one in (plan, best))
    return f"{theirs:.1f} us for each generated token", f"{here:.1f}"


def _disaggregated(request: SearchRequest, best: ServingPlan, plan: DisaggregatedPlan | None) -> Iterator[str]:
    if plan is None:
        return
    first = counted(plan.prefill_engines, "engine")
    engines = f"{first} of {counted(plan.engine_devices, 'device')} for prefill, {plan.decode_engines} for decode"
    does = (
        f"{digits(plan.tokens_per_s)} tokens/s, a TTFT of {plan.ttft * 1e3:,.0f} ms and "
        f"a TPOT of {plan.tpot * 1e3:.1f} ms, with {counted(plan.concurrency, 'request')} at once"
    )
    verdict = "is better than engines that do both" if beats(plan, best, request) else "does not pay off here"
    yield f"Disaggregated prefill and decode {verdict}: {engines} would give {does}."


def _size(request: SearchRequest, best: ServingPlan, neighbors: NeighborPlans) -> Iterator[str]:
    """Compare the plan with half and twice the devices."""
    if neighbors.half_unmet is not None:
        yield _too_few(request, best, neighbors.half_unmet)
    for plan, words in ((neighbors.half, "Half the devices"), (neighbors.twice, "Twice the devices")):
        if plan is None:
            continue
        if request.objective == "latency":
            ratio = plan.request_seconds / best.request_seconds
            yield f"{words} would take {ratio:.2f} times as long for a request{_slower(ratio, plan, best)}."
        else:
            ratio = _each(plan) / _each(best)
            yield f"{words} would serve {ratio:.2f} times as many tokens/s per device."


def _too_few(request: SearchRequest, best: ServingPlan, unmet: UnmetLimit) -> str:
    half, fabric = request.devices // 2, request.hardware.fabric
    size = request.hardware.scale_up_devices
    small = f": one {fabric} is too small" if half == size else ""
    what = {
        "model": f"cannot hold the model{small}",
        "requests": f"hold the model but have no room for {counted(best.estimate.concurrency, 'request')}{small}",
        "limits": f"cannot meet the latency limits{small if limited(request) else ''}",
    }  # fmt: skip
    return f"Half the devices, {half}, {what[unmet]}."


def _slower(ratio: float, plan: ServingPlan, best: ServingPlan) -> str:
    more = ratio if plan.devices > best.devices else 1 / ratio
    return ": more devices make it slower here" if more > 1 + REL_TOLERANCE else ""


def _each(plan: ServingPlan) -> float:
    return plan.tokens_per_s / plan.devices


def _named(request: SearchRequest, plan: ServingPlan) -> str:
    return f"{kind_of(plan.parallelism, moe=request.config.moe is not None)}: {plan.parallelism.mesh}"


def _compared(request: SearchRequest, plan: ServingPlan, best: ServingPlan) -> str:
    if request.objective == "latency":
        return f"takes {_seconds(plan.request_seconds)} s per request instead of {_seconds(best.request_seconds)}"
    return f"serves {digits(_each(plan))} tokens/s per device instead of {digits(_each(best))}"

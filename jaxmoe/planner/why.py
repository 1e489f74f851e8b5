"""The reasons of a plan in words: each sentence holds a number that the search found, none knows a model by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxmoe.planner.choose import limited
from jaxmoe.planner.improvements import improvements
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import KV_ITEMSIZES
from jaxmoe.planner.pools import DisaggregatedPlan, beats
from jaxmoe.planner.search import REL_TOLERANCE, SearchRequest, SearchResult, ServingPlan, kind_of, objective_value
from jaxmoe.planner.sizes import behind_windows, behind_words

_BOTTLENECKS = {
    "compute": "products", "memory": "reading weights and pages from memory", "link": "collectives inside a {fabric}",
    "scale_out": "collectives between {fabric}s", "launch": "launching kernels", "bubble": "stages that wait",
}  # fmt: skip
_NOTHING = f"No change of the request improves it by more than {REL_TOLERANCE:.0%}."
# What so many devices have no room for, or cannot keep.
UnmetLimit = Literal["model", "requests", "limits"]


@dataclass(frozen=True, kw_only=True)
class NeighborPlans:
    """The best plans for half and twice the devices; None where there is none, for what half of them lack."""

    half: ServingPlan | None
    twice: ServingPlan | None
    half_unmet: UnmetLimit | None = None


def reasons(
    request: SearchRequest, result: SearchResult, disaggregated: DisaggregatedPlan | None, neighbors: NeighborPlans
) -> list[str]:
    """Return why this plan: its bottleneck, the other splits, what would improve it."""
    return [
        *_bottleneck(request, result.best, neighbors), *_approximated(request), *_memory(request, result.best),
        *_tensor(request, result), *_across(request, result), *_others(request, result),
        *_disaggregated(request, result.best, disaggregated), *_size(request, result.best, neighbors),
    ]  # fmt: skip


def counted(number: int, word: str) -> str:
    """1 request, 2 requests."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def digits(number: float) -> str:
    """Whole from 100 on, three digits that count below."""
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
        f"Bottleneck: {_bottleneck_words(request, first)}, {most / mean_step.total:.0%} of a mean step of "
        f"{mean_step.total * 1e3:.1f} ms"
        f"{then}. {advice}"
    )


def _approximated(request: SearchRequest) -> Iterator[str]:
    """What is priced as something else."""
    indexer = request.config.indexer
    if indexer is not None:
        met = f"{request.workload.isl + request.workload.osl:,}"
        yield (
            f"Priced as dense latent attention: a token attends to all of up to {met} tokens before it, not to the "
            f"{indexer.top_k:,} that its indexer chooses; the indexer's own weights, products and cache are left out."
        )


def _memory(request: SearchRequest, best: ServingPlan) -> Iterator[str]:
    memory, hardware = best.serving.device_memory, request.hardware
    share, tokens = memory.weight_bytes / hardware.hbm_bytes, request.workload.isl + request.workload.osl
    yield (
        f"Weights take {memory.weight_bytes / 2**30:.1f} of the {hardware.hbm_gib:.1f} GiB of a device ({share:.0%}); "
        f"pages have room for {counted(best.max_requests, 'request')} of {tokens:,} tokens at once."
    )
    config, (item, scale) = request.config, KV_ITEMSIZES[memory.kv_dtype]
    layer_bytes = config.num_key_value_heads * sum(dim * item + scale for dim in config.cached_dims)
    behind = behind_windows(config, tokens, chunk_tokens=best.serving.chunk_tokens, num_bytes=layer_bytes)
    if behind is not None:
        yield behind_words(behind)


def _spans(request: SearchRequest, plan: ServingPlan, axes: tuple[str, ...]) -> int:
    """Fast fabrics that take part along some axes."""
    return group_of(axes, dict(plan.parallelism.axes), request.hardware.scale_up_devices).across


def _tensor(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """Why layers are split inside a fast fabric only, or that they are not."""
    best, fabric = result.best, request.hardware.fabric
    if request.devices <= request.hardware.scale_up_devices:
        return
    outside = [plan for plan in result.every if _spans(request, plan, plan.parallelism.layout.split) > 1]
    if _spans(request, best, best.parallelism.layout.split) > 1:
        yield f"Layers are split between {fabric}s: even so no other split is better by more than {REL_TOLERANCE:.0%}."
    elif outside:
        other = min(outside, key=lambda plan: objective_value(request, plan))
        verdict = f"; {_as_good(request, other, best)}" if _alike(request, other, best) else ""
        theirs, here = _part(other, best, "scale_out")
        yield (
            f"Layers are split inside a {fabric} only: the best plan that splits them between {fabric}s "
            f"({_named(request, other)}) {_compared(request, other, best)}; its collectives between {fabric}s take "
            f"{theirs}, {here} here{verdict}."
        )


def _across(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """What lies between fast fabrics."""
    best, hardware = result.best, request.hardware
    fabric = hardware.fabric
    if request.devices <= hardware.scale_up_devices:
        if request.devices > 1:
            yield f"All {request.devices} devices are on one fast fabric: nothing has to cross a slower one."
        return
    sizes, fabrics = dict(best.parallelism.axes), math.ceil(request.devices / hardware.scale_up_devices)
    crossing = [axis for axis, size in sizes.items() if size > 1 and _spans(request, best, (axis,)) > 1]
    experts = best.parallelism.layout.experts if request.config.moe else ()
    if any(axis in experts for axis in crossing):
        across = _spans(request, best, experts)
        every = "both" if fabrics == 2 else f"all {fabrics}"
        where = f"{every} {fabric}s," if across >= fabrics else f"{across} of {fabrics} {fabric}s,"
        rest = "" if across >= fabrics else "; replicas of them lie across the rest"
        yield (
            f"Experts are shared out over {where} so that every device reads fewer of them in a step and more tokens "
            f"meet each{rest}; collectives between {fabric}s take "
            f"{best.estimate.mean_step.scale_out * 1e3:.1f} ms of a "
            f"step."
        )
    elif "pipeline" in crossing:
        yield (
            f"Stages of the pipeline lie between {fabric}s: what they send there is the hidden states of a micro-batch "
            f"once a stage, {best.estimate.mean_step.scale_out * 1e3:.2f} ms of a step."
        )
    elif crossing == ["data"]:
        yield (
            f"Every replica lies inside a {fabric} and nothing crosses: do not reach for multi-{fabric} yet, "
            f"{fabrics} {fabric}s serve as {request.devices / hardware.scale_up_devices:.3g} times one."
        )


def _others(request: SearchRequest, result: SearchResult) -> Iterator[str]:
    """The best of the other kinds of split."""
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
            verdict = f"; {theirs} go to {_bottleneck_words(request, name)}, {here} here"
        yield (
            f"Instead {kind} ({plan.parallelism.mesh}, {plan.parallelism.layout}) "
            f"{_compared(request, plan, best)}{verdict}."
        )


def _alike(request: SearchRequest, plan: ServingPlan, best: ServingPlan) -> bool:
    return objective_value(request, plan) <= (1 + REL_TOLERANCE) * objective_value(request, best)


def _as_good(request: SearchRequest, plan: ServingPlan, best: ServingPlan) -> str:
    """Why the best was taken before a plan as good as it."""
    seconds, tokens = (one.request_seconds for one in (plan, best)), (_each(plan), _each(best))
    theirs, mine = seconds
    leaned = [one.estimate.mean_step.scale_out / one.estimate.mean_step.total for one in (plan, best)]
    if request.objective != "latency" and mine < theirs:
        why = f"a request takes {_seconds(mine)} s here and {_seconds(theirs)} there"
    elif request.objective == "latency" and tokens[1] > (1 + REL_TOLERANCE) * tokens[0]:
        why = f"{digits(tokens[1])} tokens/s a device are served here and {digits(tokens[0])} there"
    elif leaned[1] < leaned[0]:
        why = f"{leaned[1]:.1%} of a step lie between {request.hardware.fabric}s here and {leaned[0]:.1%} there"
    else:
        why = "its axes and options are plainer"
    return f"as good on paper; this one was taken because {why}"


def _seconds_per_token(plan: ServingPlan, name: str) -> float:
    """Seconds that one part takes, a token generated."""
    estimate = plan.estimate
    return estimate.mean_step.parts()[name] * estimate.num_steps / (estimate.concurrency * estimate.osl)


def _part(plan: ServingPlan, best: ServingPlan, name: str) -> tuple[str, str]:
    """What a part takes of both: of a step where these carry as many requests, else of a token."""
    if plan.estimate.concurrency == best.estimate.concurrency:
        theirs, here = (one.estimate.mean_step.parts()[name] * 1e3 for one in (plan, best))
        return f"{theirs:.1f} ms of a step", f"{here:.1f}"
    theirs, here = (_seconds_per_token(one, name) * 1e6 for one in (plan, best))
    return f"{theirs:.1f} us for each token generated", f"{here:.1f}"


def _disaggregated(request: SearchRequest, best: ServingPlan, plan: DisaggregatedPlan | None) -> Iterator[str]:
    if plan is None:
        return
    first = counted(plan.prefill_engines, "engine")
    engines = f"{first} of {counted(plan.engine_devices, 'device')} for prompts, {plan.decode_engines} to decode"
    does = (
        f"{digits(plan.tokens_per_s)} tokens/s, {plan.ttft * 1e3:,.0f} ms to the first token and "
        f"{plan.tpot * 1e3:.1f} ms a token, with {counted(plan.concurrency, 'request')} at once"
    )
    verdict = "serve more than engines that do both" if beats(plan, best, request) else "do not pay here"
    yield f"Separate pools for prefill and decode {verdict}: {engines} would give {does}."


def _size(request: SearchRequest, best: ServingPlan, neighbors: NeighborPlans) -> Iterator[str]:
    """What fewer and more devices would do."""
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
            yield f"{words} would serve {ratio:.2f} times as many tokens a second and device."


def _too_few(request: SearchRequest, best: ServingPlan, unmet: UnmetLimit) -> str:
    half, fabric = request.devices // 2, request.hardware.fabric
    size = request.hardware.scale_up_devices
    small = f": one {fabric} is too small" if half == size else ""
    what = {
        "model": f"cannot hold the model{small}",
        "requests": f"hold the model, and have no room for {counted(best.estimate.concurrency, 'request')}{small}",
        "limits": f"keep no such limits{small if limited(request) else ''}",
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
        return f"takes {_seconds(plan.request_seconds)} s for a request in place of {_seconds(best.request_seconds)}"
    return f"gives {digits(_each(plan))} tokens/s a device in place of {digits(_each(best))}"

"""The reasons of a plan in words: each sentence holds a number that the search found, none knows a model by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxmoe.planner.links import group_of
from jaxmoe.planner.pools import Pools, beats
from jaxmoe.planner.search import ALIKE, Found, Plan, Question, kind_of, value

_BINDS = {
    "compute": "products", "memory": "reading weights and pages from memory", "link": "collectives inside a node",
    "scale_out": "collectives between nodes", "launch": "launching kernels", "bubble": "stages that wait",
}  # fmt: skip
_LIFTS = {
    "compute": "shorter numbers in products (--weights-dtype fp8 where the hardware has such), or more devices",
    "memory": "more requests at once for the same weights, shorter weights or pages (--weights-dtype, --kv-dtype), or "
    "more devices to split them over",
    "link": "fewer ranks that split a layer, or more replicas",
    "scale_out": "keeping every split inside a node, by replicas or a pipeline between nodes",
    "launch": "more requests at once: a step's launches are the same",
    "bubble": "more chunks a stage (--stage-chunks), or fewer stages",
}


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The best plans for half and twice the devices; None where there is none."""

    half: Plan | None
    twice: Plan | None


def reasons(question: Question, found: Found, pools: Pools | None, neighbours: Neighbours) -> list[str]:
    """Why this plan, what binds it, what would lift it."""
    return [
        *_binding(found.best), *_memory(question, found.best), *_tensor(question, found), *_across(question, found),
        *_others(question, found), *_pools(question, found.best, pools), *_size(question, found.best, neighbours),
    ]  # fmt: skip


def _binding(best: Plan) -> Iterator[str]:
    turn = best.served.turn
    parts = sorted(turn.parts().items(), key=lambda item: -item[1])
    (first, most), (second, next_most) = parts[:2]
    yield (
        f"What binds: {_BINDS[first]}, {most / turn.total:.0%} of a mean turn of {turn.total * 1e3:.1f} ms; then "
        f"{_BINDS[second]}, {next_most / turn.total:.0%}. What would lift it next: {_LIFTS[first]}."
    )


def _memory(question: Question, best: Plan) -> Iterator[str]:
    held, hardware = best.serving.held, question.hardware
    share, tokens = held.weight_bytes / hardware.hbm_bytes, question.load.isl + question.load.osl
    yield (
        f"Weights take {held.weight_bytes / 2**30:.1f} of the {hardware.hbm_gib:.1f} GiB of a device ({share:.0%}); "
        f"pages have room for {best.most_requests:,} requests of {tokens:,} tokens at once."
    )


def _spans(question: Question, plan: Plan, axes: tuple[str, ...]) -> bool:
    return group_of(axes, dict(plan.spec.axes), question.hardware.scale_up_devices).across > 1


def _tensor(question: Question, found: Found) -> Iterator[str]:
    """Why tensor stays inside a node, or that it does not."""
    best = found.best
    if question.devices <= question.hardware.scale_up_devices:
        return
    outside = [plan for plan in found.every if _spans(question, plan, plan.spec.layout.split)]
    if _spans(question, best, best.spec.layout.split):
        yield "Layers are split between nodes: even so no other split is faster."
    elif outside:
        other = min(outside, key=lambda plan: value(question, plan))
        near = value(question, other) <= (1 + ALIKE) * value(question, best)
        verdict = "; as good on paper, and this one leans less on links between nodes" if near else ""
        yield (
            "Layers are split inside a node only: the best plan that splits them between nodes "
            f"({_named(question, other)}) {_compared(question, other, best)}; its collectives between nodes take "
            f"{other.served.turn.scale_out * 1e3:.1f} ms of a turn, {best.served.turn.scale_out * 1e3:.1f} here"
            f"{verdict}."
        )


def _across(question: Question, found: Found) -> Iterator[str]:
    """What lies between nodes."""
    best, hardware = found.best, question.hardware
    if question.devices <= hardware.scale_up_devices:
        if question.devices > 1:
            yield f"All {question.devices} devices are on one fast fabric: nothing has to cross a slower one."
        return
    sizes, nodes = dict(best.spec.axes), math.ceil(question.devices / hardware.scale_up_devices)
    crossing = [axis for axis, size in sizes.items() if size > 1 and _spans(question, best, (axis,))]
    exchanged = best.spec.layout.experts if question.config.moe else ()
    if any(axis in exchanged for axis in crossing):
        yield (
            f"Experts are shared out over all {nodes} nodes, so that every device reads fewer of them in a turn and "
            f"more tokens meet each; that sends between nodes for {best.served.turn.scale_out * 1e3:.1f} ms of a turn."
        )
    elif "pipeline" in crossing:
        yield (
            "Stages of the pipeline lie between nodes: of all splits theirs sends least, hidden states of a "
            f"micro-batch once a stage, {best.served.turn.scale_out * 1e3:.2f} ms of a turn."
        )
    elif crossing == ["data"]:
        yield (
            f"Every replica lies inside a node and nothing crosses: do not reach for multi-node yet, {nodes} nodes "
            f"serve as {nodes} times one."
        )


def _others(question: Question, found: Found) -> Iterator[str]:
    """The best of the other kinds of split."""
    moe, best = question.config.moe is not None, found.best
    seen = {kind_of(best.spec, moe=moe)}
    shown = 0
    for plan in sorted(found.every, key=lambda plan: value(question, plan)):
        kind = kind_of(plan.spec, moe=moe)
        if kind in seen or shown == 3:
            continue
        seen.add(kind)
        shown += 1
        worst = max(
            ((name, value - best.served.turn.parts()[name]) for name, value in plan.served.turn.parts().items()),
            key=lambda item: item[1],
        )
        loses = f"; it loses {worst[1] * 1e3:.1f} ms a turn to {_BINDS[worst[0]]}" if worst[1] > 0 else ""
        yield f"Instead {kind} ({plan.spec.mesh}, {plan.spec.layout}) {_compared(question, plan, best)}{loses}."


def _pools(question: Question, best: Plan, pools: Pools | None) -> Iterator[str]:
    if pools is None:
        return
    size = pools.engine_devices
    engines = f"{pools.prefill_engines} engines of {size} devices for prompts, {pools.decode_engines} to decode"
    does = (
        f"{pools.tokens_a_second:,.0f} tokens/s, {pools.ttft * 1e3:,.0f} ms to the first token and "
        f"{pools.tpot * 1e3:.1f} ms a token"
    )
    verdict = "serve more than engines that do both" if beats(pools, best, question) else "do not pay here"
    yield f"Separate pools for prefill and decode {verdict}: {engines} would give {does}."


def _size(question: Question, best: Plan, neighbours: Neighbours) -> Iterator[str]:
    """What fewer and more devices would do."""
    for plan, words in ((neighbours.half, "Half the devices"), (neighbours.twice, "Twice the devices")):
        if plan is None:
            continue
        if question.objective == "latency":
            ratio = plan.request_seconds / best.request_seconds
            yield f"{words} would take {ratio:.2f} times as long for a request{_slower(ratio, plan, best)}."
        else:
            ratio = plan.tokens_a_second / plan.devices / (best.tokens_a_second / best.devices)
            yield f"{words} would serve {ratio:.2f} times as many tokens a second and device."


def _slower(ratio: float, plan: Plan, best: Plan) -> str:
    return ": more devices make it slower here" if (plan.devices > best.devices) == (ratio > 1) else ""


def _named(question: Question, plan: Plan) -> str:
    return f"{kind_of(plan.spec, moe=question.config.moe is not None)}: {plan.spec.mesh}"


def _compared(question: Question, plan: Plan, best: Plan) -> str:
    if question.objective == "latency":
        return f"takes {plan.request_seconds:.2f} s for a request in place of {best.request_seconds:.2f}"
    mine, other = (one.tokens_a_second / one.devices for one in (best, plan))
    return f"gives {other:,.0f} tokens/s a device in place of {mine:,.0f}"

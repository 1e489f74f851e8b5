"""Prefill and decode on devices of their own: how a cluster would be shared out between them, and what that serves.

A pool is several engines of the same size. Prompts' keys and values travel from an engine of one pool to one of the
other; how a plan says so is its business, jaxmoe runs each engine by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxmoe.planner.cost import Rows
from jaxmoe.planner.search import Plan, Question, Spec, servings_of, specs_of
from jaxmoe.planner.serving import Served, Serving

_CHUNKS = (2048, 8192)


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Engines of `engine_devices` each: so many that prefill, so many that decode. Seconds; tokens a second of all."""

    engine_devices: int
    prefill_engines: int
    decode_engines: int
    prefill: Spec
    decode: Spec
    concurrency: int
    ttft: float
    tpot: float
    transfer: float
    tokens_a_second: float


@dataclass(frozen=True)
class _Prefill:
    spec: Spec
    requests_a_second: float
    seconds: float  # of one prompt


def best_pools(question: Question, *, engine_devices: int) -> Pools | None:
    """The best way to share out the devices in engines of this size; None where there are fewer than two, one holds
    too little, or no limit of latency can be met."""
    engines = question.devices // engine_devices
    if engines < 2:
        return None
    small = replace(question, devices=engine_devices, axes=None, load=replace(question.load, concurrency=None))
    # One way of sending tokens to experts: the last that the hardware has sends least.
    servings = [
        (alike[-1], serving.dispatched(alike[-1].dispatch)) for alike, serving in servings_of(small, specs_of(small))
    ]
    prefills = [one for spec, serving in servings for one in _prefills(small, spec, serving)]
    if not prefills:
        return None
    first = max(prefills, key=lambda one: one.requests_a_second)
    second = _decode(small, servings)
    if second is None:
        return None
    spec, serving, served = second
    transfer = _transfer(question, serving)
    load, found = question.load, []
    for count in range(1, engines):
        rate = min(count * first.requests_a_second * load.osl, (engines - count) * served.tokens_a_second)
        pools = Pools(
            engine_devices=engine_devices, prefill_engines=count, decode_engines=engines - count, prefill=first.spec,
            decode=spec, concurrency=served.concurrency * (engines - count), ttft=first.seconds + transfer,
            tpot=served.tpot, transfer=transfer, tokens_a_second=rate,
        )  # fmt: skip
        if question.ttft_limit is None or pools.ttft <= question.ttft_limit:
            found.append(pools)
    return max(found, key=lambda one: one.tokens_a_second, default=None)


def _prefills(question: Question, spec: Spec, serving: Serving) -> list[_Prefill]:
    """What an engine that only reads prompts does, by the tokens of a step."""
    isl, found = question.load.isl, []
    for chunk in _CHUNKS:
        step = serving.cost.seconds(Rows(0, chunk, 0, isl / 2)).total
        found.append(
            _Prefill(replace(spec, chunk_tokens=chunk), serving.ranks * chunk / isl / step, step * isl / chunk)
        )
    return found


def _decode(question: Question, servings: list[tuple[Spec, Serving]]) -> tuple[Spec, Serving, Served] | None:
    """The engine that decodes most, with prompts already there."""
    found = []
    for spec, serving in servings:
        most = serving.most_requests(question.load)
        for count in {max(1, most >> power) for power in range(0, 8, 2)}:
            served = serving.serve(question.load, count, prefills=False)
            if question.tpot_limit is None or served.tpot <= question.tpot_limit:
                found.append((spec, serving, served))
    return max(found, key=lambda one: one[2].tokens_a_second, default=None)


def _transfer(question: Question, serving: Serving) -> float:
    """Seconds for a prompt's keys and values to travel: every device of an engine sends what it holds."""
    held, hardware = serving.held, question.hardware
    near = question.devices <= hardware.scale_up_devices
    rate = hardware.link_bytes_a_second(scale_out=not near)
    return question.load.isl * held.kv_bytes_a_token / rate


def beats(pools: Pools, plan: Plan, question: Question) -> bool:
    """Whether pools serve more than a plan whose engines do both, by more than prices are exact."""
    if question.objective == "latency":
        return pools.ttft + plan.osl * pools.tpot < 0.95 * plan.request_seconds
    return pools.tokens_a_second > 1.05 * plan.tokens_a_second

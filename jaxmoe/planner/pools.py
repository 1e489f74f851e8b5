"""Plan disaggregated serving: how to divide a cluster between prefill and decode engines, and its performance.

A pool is several engines of the same size. The KV cache of a prompt is transferred from a prefill engine to a decode
engine. jaxmoe itself runs each engine separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxmoe.planner.choose import ServingPlan
from jaxmoe.planner.search import servings_of
from jaxmoe.planner.serving import ServingEstimate, ServingModel
from jaxmoe.planner.specs import CHUNKS, ParallelismConfig, SearchRequest, candidates_of
from jaxmoe.planner.step_time import StepBatch

_SHARES = 64  # most ways to divide the engines that are tried


@dataclass(frozen=True, kw_only=True)
class DisaggregatedPlan:
    """Describe pools of prefill and decode engines of `engine_devices` devices each, and their performance.

    ttft, tpot, transfer (of a prompt's KV cache): seconds. tokens_per_s: generated tokens per second over all engines.
    """

    engine_devices: int
    prefill_engines: int
    decode_engines: int
    prefill: ParallelismConfig
    decode: ParallelismConfig
    concurrency: int
    ttft: float
    tpot: float
    transfer: float
    tokens_per_s: float
    osl: int

    @property
    def request_seconds(self) -> float:
        """Return the seconds from a request's arrival to its last token."""
        return self.ttft + (self.osl - 1) * self.tpot


@dataclass(frozen=True)
class _PrefillEngine:
    parallelism: ParallelismConfig
    requests_per_s: float
    seconds: float  # of one prompt


_DecodeEngine = tuple[ParallelismConfig, ServingModel, ServingEstimate]


def best_disaggregated(
    request: SearchRequest, *, engine_devices: int, concurrency: int | None = None
) -> DisaggregatedPlan | None:
    """Return the best division of the devices into prefill and decode engines of a given size.

    Returns None if there are fewer than two engines, the model or requests do not fit in one, osl is 1, or the latency
    limits cannot be met. concurrency: concurrent requests over all engines; searched by default.
    """
    engines = request.devices // engine_devices
    if engines < 2 or request.workload.osl == 1:
        return None
    small = replace(request, devices=engine_devices, axes=None, workload=replace(request.workload, concurrency=None))
    # One dispatch backend is enough: the last that the hardware supports sends the fewest bytes.
    servings = [
        (alike[-1], serving.dispatched(alike[-1].dispatch))
        for alike, serving in servings_of(small, candidates_of(small))
    ]
    prefills = [one for parallelism, serving in servings for one in _prefills(small, parallelism, serving)]
    plans, second = [], _decode(small, servings, None) if concurrency is None else None
    for count in range(1, engines, math.ceil(engines / _SHARES)):
        if concurrency is not None:
            second = _decode(small, servings, math.ceil(concurrency / (engines - count)))
        first = None if second is None else _first(request, prefills, _transfer(request, second[1]))
        if first is not None and second is not None:
            shared = engine_devices, count, engines - count
            plans.append(_disaggregated(request, first, second, shared, concurrency))
    limit = math.inf if request.ttft_limit is None else request.ttft_limit
    plans = [plan for plan in plans if plan.ttft <= limit * (1 + 1e-9)]
    if request.objective == "latency":
        return min(plans, key=lambda one: one.request_seconds, default=None)
    return max(plans, key=lambda one: one.tokens_per_s, default=None)


def _disaggregated(
    request: SearchRequest,
    first: _PrefillEngine,
    second: _DecodeEngine,
    shared: tuple[int, int, int],
    concurrency: int | None,
) -> DisaggregatedPlan:
    """Return the plan for given numbers of prefill and decode engines.

    The throughput is limited by each pool and by the given concurrency. With a given concurrency, requests in excess of
    the engines' capacity wait for prefill, which raises the TTFT.
    """
    (parallelism, serving, estimate), (size, prefilling, decoding) = second, shared
    transfer, osl = _transfer(request, serving), request.workload.osl
    ttft = first.seconds + transfer
    rate = min(prefilling * first.requests_per_s * osl, decoding * estimate.tokens_per_s)
    if concurrency is not None:
        decoding_seconds = (osl - 1) * estimate.tpot
        rate = min(rate, concurrency * osl / (ttft + decoding_seconds))
        ttft = max(ttft, concurrency * osl / rate - decoding_seconds)
    else:  # requests in prefill count, too
        concurrency = math.ceil(rate / osl * (ttft + (osl - 1) * estimate.tpot))
    return DisaggregatedPlan(
        engine_devices=size, prefill_engines=prefilling, decode_engines=decoding,
        prefill=first.parallelism, decode=parallelism, concurrency=concurrency, ttft=ttft,
        tpot=estimate.tpot, transfer=transfer, tokens_per_s=rate, osl=osl,
    )  # fmt: skip


def _prefills(request: SearchRequest, parallelism: ParallelismConfig, serving: ServingModel) -> list[_PrefillEngine]:
    """Return prefill engines for each chunk size. A prompt takes whole steps, which it may share with others."""
    isl, engines = request.workload.isl, []
    for chunk in [request.chunk_tokens] if request.chunk_tokens else sorted({*CHUNKS, min(isl, CHUNKS[-1])}):
        step = serving.cost.step_time(StepBatch(0, chunk, 0, isl / 2)).total
        rate = serving.ranks * chunk / isl / step
        engines.append(_PrefillEngine(replace(parallelism, chunk_tokens=chunk), rate, step * math.ceil(isl / chunk)))
    return engines


def _first(request: SearchRequest, prefills: Iterable[_PrefillEngine], transfer: float) -> _PrefillEngine | None:
    """Return the prefill engine with the highest throughput within the TTFT limit; for latency the fastest."""
    limit = math.inf if request.ttft_limit is None else request.ttft_limit
    kept = [one for one in prefills if one.seconds + transfer <= limit]
    if request.objective == "latency":
        return min(kept, key=lambda one: one.seconds, default=None)
    return max(kept, key=lambda one: one.requests_per_s, default=None)


def _decode(
    request: SearchRequest, servings: list[tuple[ParallelismConfig, ServingModel]], rows: int | None
) -> _DecodeEngine | None:
    """Return the decode engine with the highest throughput within the TPOT limit; for latency the lowest TPOT.

    rows: its number of requests, if known.
    """
    engines: list[_DecodeEngine] = []
    for parallelism, serving in servings:
        most = serving.max_requests(request.workload)
        if rows is not None:
            counts = {rows} if rows <= most else set()
        else:
            counts = {max(1, most >> power) for power in range(0, 8, 2)}
        for count in counts:
            estimate = serving.estimate(request.workload, count, prefills=False)
            if request.tpot_limit is None or estimate.tpot <= request.tpot_limit:
                engines.append((parallelism, serving, estimate))
    if request.objective == "latency":
        return min(engines, key=lambda one: one[2].tpot, default=None)
    return max(engines, key=lambda one: one[2].tokens_per_s, default=None)


def _transfer(request: SearchRequest, serving: ServingModel) -> float:
    """Return the seconds to transfer a prompt's KV cache; every device of an engine sends its part."""
    memory, hardware = serving.device_memory, request.hardware
    near = request.devices <= hardware.scale_up_devices
    rate = hardware.link_bytes_per_s(scale_out=not near)
    return memory.config.cached_tokens(request.workload.isl, 0) * memory.kv_bytes_per_token / rate


def beats(disaggregated: DisaggregatedPlan, plan: ServingPlan, request: SearchRequest) -> bool:
    """Return whether disaggregated engines beat a plan whose engines do both by 5%, beyond the estimates' error."""
    if request.objective == "latency":
        return disaggregated.request_seconds < 0.95 * plan.request_seconds
    return disaggregated.tokens_per_s > 1.05 * plan.tokens_per_s

"""Estimate the concurrency, TTFT, TPOT and throughput of a placement.

The model assumes requests of equal lengths, a constant concurrency and chunked prefill. With b running requests on a
rank, b * isl / chunk of the steps in a request's lifetime contain a chunk of some prompt; the others only decode. The
scheduler admits only requests whose KV cache fits up to their last token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmoe.planner.cost import StepCost
from jaxmoe.planner.step_time import StepBatch, StepTime

# Share of the memory left by weights and step buffers that KV cache pages may use.
_PAGES = 0.9
_MAX_ROWS = 4096  # requests per rank
_RESERVE = 0.02  # share of a device's memory for the runtime


@dataclass(frozen=True, kw_only=True)
class RequestWorkload:
    """Describe the requests to serve.

    isl: prompt tokens. osl: tokens to generate. concurrency: concurrent requests over all devices; searched if None.
    """

    isl: int
    osl: int
    concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServingEstimate:
    """Hold the estimated performance of one placement under one workload. Times are in seconds.

    tpot: time per output token, 0 if osl is 1. tokens_per_s: generated tokens per second over all devices. mean_step:
    time of the mean step by bottleneck. num_steps: steps per request.
    """

    concurrency: int
    ttft: float
    tpot: float
    tokens_per_s: float
    mean_step: StepTime
    num_steps: float
    chunk_tokens: int
    osl: int

    @property
    def request_seconds(self) -> float:
        """Return the seconds from a request's arrival to its last token."""
        return self.ttft + (self.osl - 1) * self.tpot

    @property
    def seconds_per_token(self) -> float:
        """Return the seconds a user waits for a token: the TPOT, or the TTFT if there is only one token."""
        return self.tpot or self.ttft


class ServingModel:
    """Estimate the serving performance of one placement."""

    def __init__(self, cost: StepCost, *, chunk_tokens: int) -> None:
        self.cost, self.device_memory, self.chunk_tokens = cost, cost.device_memory, chunk_tokens
        self.ranks = cost.placement.num_shards("batch")
        self._most: dict[int, int] = {}

    def dispatched(self, dispatch: str) -> ServingModel:
        """Return a copy with another dispatch backend."""
        other = ServingModel(self.cost.dispatched(dispatch), chunk_tokens=self.chunk_tokens)
        other._most = self._most
        return other

    def step_bytes(self, rows: int) -> float:
        """Return the temporary bytes on a device for a step of `rows` decoding requests per rank and one chunk."""
        return sum(self.step_parts(rows).values())

    def step_parts(self, rows: int) -> dict[str, float]:
        """Return step_bytes by part."""
        parts = self.device_memory.step_parts(self.chunk_tokens + rows, rows)
        return {name: num_bytes / self.cost.num_stages for name, num_bytes in parts.items()}

    def pool_tokens(self, rows: int = 64) -> float:
        """Return the tokens that fit in a rank's KV cache, given a step of `rows` decoding requests and one chunk."""
        free = self.cost.hardware.hbm_bytes * (1 - _RESERVE) - self.device_memory.weight_bytes - self.step_bytes(rows)
        return max(0.0, free * _PAGES / self.device_memory.kv_bytes_per_token)

    def max_requests(self, workload: RequestWorkload) -> int:
        """Return the most concurrent requests over all devices whose KV cache fits up to their last token.

        If every layer has a window, only the most tokens cached at once count.
        """
        tokens, rows = self.device_memory.config.cached_tokens(workload.isl + workload.osl, self.chunk_tokens), 64
        if tokens not in self._most:
            for _ in range(3):  # more rows need more memory for logits
                rows = max(1, min(_MAX_ROWS, int(self.pool_tokens(rows) / tokens)))
            self._most[tokens] = int(min(_MAX_ROWS, self.pool_tokens(rows) / tokens)) * self.ranks
        return self._most[tokens]

    def estimate(self, workload: RequestWorkload, concurrency: int, *, prefills: bool = True) -> ServingEstimate:
        """Estimate the performance at a concurrency.

        prefills: whether these devices also prefill the prompts. The time of a request is the time in which a rank
        processes all its running requests once; the part that is not decoding is the TTFT.
        """
        rows = max(concurrency / self.ranks, 1.0)  # a rank without requests still runs every step
        chunk = min(self.chunk_tokens, math.ceil(rows * workload.isl))  # at most the prompt tokens of all requests
        context, prompt, later = workload.isl + workload.osl / 2, workload.isl / 2, workload.osl - 1
        alone = self.cost.step_time(StepBatch(rows, 0, context))
        if not prefills:
            return self._estimate(
                workload, concurrency, alone.mixed(workload.osl, alone, 0.0), workload.osl, tpot=alone.total
            )
        mixed = self.cost.step_time(StepBatch(rows, chunk, context, prompt))
        own = max(1.0, workload.isl / chunk)  # prefill steps of one request; the last samples a token
        chunks = max(own, rows * workload.isl / chunk)  # prefill steps of all requests
        seconds = mixed.mixed(chunks, alone, max(0.0, own + later - chunks))
        waiting = 0.5 * (chunks - own) / workload.osl * mixed.total  # for chunks of other requests
        tpot = 0.0
        if later:
            tpot = (seconds.total - own * mixed.total - waiting) / later
            tpot = min(max(tpot, alone.total), max(mixed.total, alone.total))
        return self._estimate(workload, concurrency, seconds, max(chunks, own + later), tpot=tpot)

    def _estimate(
        self, workload: RequestWorkload, concurrency: int, seconds: StepTime, num_steps: float, *, tpot: float
    ) -> ServingEstimate:
        """Return the estimate for requests of the given total seconds and number of steps."""
        return ServingEstimate(
            concurrency=concurrency,
            ttft=seconds.total - (workload.osl - 1) * tpot,
            tpot=tpot,
            tokens_per_s=concurrency * workload.osl / seconds.total,
            mean_step=seconds.mixed(1 / num_steps, seconds, 0.0),
            num_steps=num_steps,
            chunk_tokens=self.chunk_tokens,
            osl=workload.osl,
        )

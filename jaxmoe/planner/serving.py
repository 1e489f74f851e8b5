"""What a placement serves: requests at once, time to the first token, time a token, tokens a second.

Requests of equal lengths, always as many at once, chunked prefill beside decoding: of `b` requests of a rank,
b * isl / chunk of a request's steps carry a chunk of some prompt; the others decode alone. The controller takes
in as many as its pages have room for to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmoe.planner.cost import StepBatch, StepCost, StepTime

# Of what weights and a step leave, the share that pages may take.
_PAGES = 0.9
_MAX_ROWS = 4096  # of a rank
_RESERVE = 0.02  # of a device's memory, for the runtime itself


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests: prompt tokens, tokens to generate, how many at once over all devices (None: as many as fit)."""

    isl: int
    osl: int
    concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServingEstimate:
    """Of one placement under one load; seconds. tpot: 0 where no token follows the first. tokens_per_s: generated
    ones, over all devices. mean_step: time of the mean step, by bottleneck; num_steps: that a request takes."""

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
        """From a request's arrival to its last token."""
        return self.ttft + (self.osl - 1) * self.tpot

    @property
    def seconds_per_token(self) -> float:
        """Seconds that a user waits for a token: each after the first, or the only one."""
        return self.tpot or self.ttft


class ServingModel:
    """What one placement can serve."""

    def __init__(self, cost: StepCost, *, chunk_tokens: int) -> None:
        self.cost, self.device_memory, self.chunk_tokens = cost, cost.device_memory, chunk_tokens
        self.ranks = cost.placement.num_shards("batch")
        self._most: dict[int, int] = {}

    def dispatched(self, dispatch: str) -> ServingModel:
        """The same, with tokens sent to experts another way."""
        other = ServingModel(self.cost.dispatched(dispatch), chunk_tokens=self.chunk_tokens)
        other._most = self._most
        return other

    def step_bytes(self, rows: int) -> float:
        """What a step of `rows` decoding requests of a rank and a chunk needs on a device."""
        return sum(self.step_parts(rows).values())

    def step_parts(self, rows: int) -> dict[str, float]:
        """The same, by what it is for."""
        parts = self.device_memory.step_parts(self.chunk_tokens + rows, rows)
        return {name: num_bytes / self.cost.num_stages for name, num_bytes in parts.items()}

    def pool_tokens(self, rows: int = 64) -> float:
        """Tokens that a rank's pages hold, beside weights and a step of `rows` decoding requests and a chunk."""
        free = self.cost.hardware.hbm_bytes * (1 - _RESERVE) - self.device_memory.weight_bytes - self.step_bytes(rows)
        return max(0.0, free * _PAGES / self.device_memory.kv_bytes_per_token)

    def max_requests(self, workload: Workload) -> int:
        """Over all devices, each with room to its end; where every layer has a window, for what it holds at once."""
        tokens, rows = self.device_memory.config.cached_tokens(workload.isl + workload.osl, self.chunk_tokens), 64
        if tokens not in self._most:
            for _ in range(3):  # more rows need more room for their logits
                rows = max(1, min(_MAX_ROWS, int(self.pool_tokens(rows) / tokens)))
            self._most[tokens] = int(min(_MAX_ROWS, self.pool_tokens(rows) / tokens)) * self.ranks
        return self._most[tokens]

    def estimate(self, workload: Workload, concurrency: int, *, prefills: bool = True) -> ServingEstimate:
        """With so many requests at once. prefills: whether their prompts are read here too. A request takes as long as
        all requests of a rank take to come by once: what it does not decode in, it waits for its first token."""
        rows = max(concurrency / self.ranks, 1.0)  # a rank without requests takes part in every step all the same
        chunk = min(self.chunk_tokens, math.ceil(rows * workload.isl))  # no more than there are
        context, prompt, later = workload.isl + workload.osl / 2, workload.isl / 2, workload.osl - 1
        alone = self.cost.step_time(StepBatch(rows, 0, context))
        if not prefills:
            return self._estimate(
                workload, concurrency, alone.mixed(workload.osl, alone, 0.0), workload.osl, tpot=alone.total
            )
        mixed = self.cost.step_time(StepBatch(rows, chunk, context, prompt))
        own = max(1.0, workload.isl / chunk)  # steps that read a request's prompt, the last of which draws a token
        chunks = max(own, rows * workload.isl / chunk)  # steps that read anyone's
        seconds = mixed.mixed(chunks, alone, max(0.0, own + later - chunks))
        waiting = 0.5 * (chunks - own) / workload.osl * mixed.total  # behind others' chunks
        tpot = 0.0
        if later:
            tpot = (seconds.total - own * mixed.total - waiting) / later
            tpot = min(max(tpot, alone.total), max(mixed.total, alone.total))
        return self._estimate(workload, concurrency, seconds, max(chunks, own + later), tpot=tpot)

    def _estimate(
        self, workload: Workload, concurrency: int, seconds: StepTime, num_steps: float, *, tpot: float
    ) -> ServingEstimate:
        """What is served where a request takes so many seconds, in so many steps."""
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

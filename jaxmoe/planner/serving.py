"""What a placement serves: requests at once, time to the first token, time a token, tokens a second.

Requests of equal lengths, always as many at once, chunked prefill beside decoding: of `b` requests of a rank,
b * isl / chunk of a request's `osl` turns carry a chunk of some prompt; the others decode alone. The controller takes
in as many as its pages have room for to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxmoe.planner.cost import Rows, Seconds, StepCost

# Of what weights and a step leave, the share that pages may take.
_PAGES = 0.9
_MOST_ROWS = 4096  # of a rank
_RESERVE = 0.02  # of a device's memory, for the runtime itself


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests: prompt tokens, tokens to generate, how many at once over all devices (None: as many as fit)."""

    isl: int
    osl: int
    concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """Of one placement under one load; seconds. tokens_a_second: generated ones, over all devices. turn: of the mean
    turn, by what binds it."""

    concurrency: int
    ttft: float
    tpot: float
    tokens_a_second: float
    turn: Seconds
    chunk_tokens: int
    osl: int


class Serving:
    """What one placement can serve."""

    def __init__(self, cost: StepCost, *, chunk_tokens: int) -> None:
        self.cost, self.held, self.chunk_tokens = cost, cost.held, chunk_tokens
        self.ranks = cost.placement.parts("batch")
        self._most: dict[int, int] = {}

    def dispatched(self, dispatch: str) -> Serving:
        """The same, with tokens sent to experts another way."""
        other = Serving(self.cost.dispatched(dispatch), chunk_tokens=self.chunk_tokens)
        other._most = self._most
        return other

    def step_bytes(self, rows: int) -> float:
        """What a step of `rows` decoding requests of a rank and a chunk needs on a device."""
        return sum(self.step_parts(rows).values())

    def step_parts(self, rows: int) -> dict[str, float]:
        """The same, by what it is for."""
        parts = self.held.step_parts(self.chunk_tokens + rows, rows)
        return {name: num_bytes / self.cost.num_stages for name, num_bytes in parts.items()}

    def pool_tokens(self, rows: int = 64) -> float:
        """Tokens that a rank's pages hold, beside weights and a step of `rows` decoding requests and a chunk."""
        free = self.cost.hardware.hbm_bytes * (1 - _RESERVE) - self.held.weight_bytes - self.step_bytes(rows)
        return max(0.0, free * _PAGES / self.held.kv_bytes_a_token)

    def most_requests(self, load: Load) -> int:
        """Over all devices, each with room to its end."""
        tokens, rows = load.isl + load.osl, 64
        if tokens not in self._most:
            for _ in range(3):  # more rows need more room for their logits
                rows = max(1, min(_MOST_ROWS, int(self.pool_tokens(rows) / tokens)))
            self._most[tokens] = int(min(_MOST_ROWS, self.pool_tokens(rows) / tokens)) * self.ranks
        return self._most[tokens]

    def serve(self, load: Load, concurrency: int, *, prefills: bool = True) -> Served:
        """With so many requests at once. prefills: whether their prompts are read here too."""
        rows = max(concurrency / self.ranks, 1.0)  # a rank without requests takes part in every step all the same
        busy = concurrency / (rows * self.ranks)
        chunk = min(self.chunk_tokens, math.ceil(rows * load.isl))  # no more than there are
        context, prompt = load.isl + load.osl / 2, load.isl / 2
        chunks = rows * load.isl / chunk * prefills  # turns of one request's `osl` that carry a chunk
        mixed = self.cost.seconds(Rows(rows, chunk, context, prompt))
        alone = self.cost.seconds(Rows(rows, 0, context))
        turns = mixed.mixed(chunks, alone, max(0.0, load.osl - chunks))
        cycle = turns.total
        first = max(1.0, load.isl / chunk) * (
            mixed.total if rows > 1 else self.cost.seconds(Rows(1, chunk, context, prompt)).total
        )
        waiting = 0.5 * max(0.0, chunks - load.isl / chunk) / load.osl * mixed.total  # behind others' chunks
        own = load.isl / chunk * mixed.total if prefills else 0.0  # of the cycle, in which the request draws no token
        return Served(
            concurrency=concurrency, ttft=first + waiting,
            tpot=max(alone.total, (cycle - own) / max(1, load.osl - 1)),
            tokens_a_second=busy * rows * self.ranks * load.osl / cycle, turn=turns.mixed(1 / load.osl, turns, 0.0),
            chunk_tokens=self.chunk_tokens, osl=load.osl,
        )  # fmt: skip

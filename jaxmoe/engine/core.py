"""The loop of the engine: plan a step, send it to the devices, take what an earlier one brought. Single-threaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxmoe.engine.batch import Bucket, all_buckets, bucket_of, pack
from jaxmoe.engine.request import Chunk, RequestOutput, SamplingParams
from jaxmoe.engine.runner import EngineState, Runner
from jaxmoe.engine.scheduler import Limits, Scheduler, Sequence, StepPlan
from jaxmoe.engine.tokenizer import TextStream, Tokenizer
from jaxmoe.errors import StepError


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A request that ended without another token: "cancelled", "deadline", or "error" with the StepError."""

    index: int
    finish_reason: str
    error: StepError | None = None


@dataclass(kw_only=True, eq=False)
class Request:
    """One request from the moment it is queued: what it asked for, and what came so far."""

    index: int
    params: SamplingParams
    sequence: Sequence
    stream: TextStream
    num_prompt: int
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    events: deque[Chunk | Ended] = field(default_factory=deque)  # what came and nobody has looked at yet

    @property
    def token_ids(self) -> list[int]:
        """The answer so far."""
        return self.sequence.tokens[self.num_prompt :]

    def push(self, token: int, logprob: float, eos: frozenset[int]) -> Chunk:
        """Take the newest token; decides whether it was the last."""
        self.logprobs.append(logprob)
        if token in eos and not self.params.ignore_eos:
            self.finish_reason, text = "stop", self.stream.finish()
        else:
            text = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.sequence.tokens) >= self.sequence.max_total:
                self.finish_reason, text = "length", text + self.stream.finish()
        return Chunk(index=self.index, token_id=token, logprob=logprob, text=text, finish_reason=self.finish_reason)

    def output(self) -> RequestOutput:
        """The finished request."""
        assert self.finish_reason is not None
        return RequestOutput(
            index=self.index, prompt_token_ids=self.sequence.tokens[: self.num_prompt], token_ids=self.token_ids,
            logprobs=self.logprobs, text=self.stream.text, finish_reason=self.finish_reason,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    plan: StepPlan
    places: list[tuple[int, int]]
    tokens: jax.Array
    logprobs: jax.Array


class Core:
    """Requests on one model within limits. Not to be used from two threads at once."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        tokenizer: Tokenizer | None,
        eos: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.limits, self.tokenizer, self.eos = runner, limits, tokenizer, eos
        self.scheduler = Scheduler(limits)
        self.requests: dict[int, Request] = {}
        self.buckets: set[Bucket] = set()
        self.sealed = False
        self.num_new_tokens = 0
        self._clock = clock
        self._row_pages = -(-limits.context // limits.page_size)
        self._in_flight: deque[_InFlight] = deque()
        self._next_id = 0
        self._state = self._fresh_state()

    def _fresh_state(self) -> EngineState:
        return self.runner.empty_state(self.limits.rows, self.limits.num_pages, self.limits.page_size)

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every bucket; after that a step of another shape is an error."""
        buckets = all_buckets(self.limits, least_rows=self.runner.least_rows, pages=self._row_pages)
        on_progress(0, len(buckets))
        for done, bucket in enumerate(buckets, 1):
            nothing, _ = pack(StepPlan(decodes=[], chunks=[]), bucket, self.limits, None)
            self._state, tokens, _ = self.runner.step(self._state, nothing, False, bucket)
            jax.block_until_ready(tokens)
            self.buckets.add(bucket)
            on_progress(done, len(buckets))
        self.sealed = True

    # --- requests ---

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.requests or self._in_flight)

    def submit(
        self, index: int, ids: list[int], params: SamplingParams, *, priority: int = 0, deadline: float | None = None
    ) -> Request:
        """Queue a request. deadline: by the core's clock. Raises: RequestError if it can never fit."""
        room = max(0, self.limits.context - len(ids))
        most = len(ids) + min(params.max_tokens, room)
        sequence = Sequence(
            request_id=self._next_id, tokens=list(ids), max_total=most, priority=priority, deadline=deadline
        )
        self.scheduler.add(sequence)
        stream = TextStream(self.tokenizer, params.stop)
        request = Request(index=index, params=params, sequence=sequence, stream=stream, num_prompt=len(ids))
        self.requests[self._next_id] = request
        self._next_id += 1
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; an ended one is left alone."""
        if request.finish_reason is None:
            self._end(request.sequence, "cancelled")

    def _end(self, sequence: Sequence, reason: str, error: StepError | None = None) -> None:
        request = self.requests.pop(sequence.request_id)
        self.scheduler.finish(sequence)
        request.finish_reason = reason
        request.events.append(Ended(index=request.index, finish_reason=reason, error=error))

    # --- the loop ---

    def advance(self) -> list[Request]:
        """Send the next step off and take what the one before brought: the requests that have new events."""
        told: list[Request] = []
        try:
            for sequence in self.scheduler.expired(self._clock()):
                self._end(sequence, "deadline")
            plan = self.scheduler.plan()
            if plan:
                self._guarded(plan, lambda: self._dispatch(plan))
            if self._in_flight and (len(self._in_flight) > 1 or not plan):
                step = self._in_flight.popleft()
                self._guarded(step.plan, lambda: told.extend(self._complete(step)))
        except BaseException:  # an interruption in the middle: what was planned may or may not have been sent
            self._start_over(StepPlan(decodes=[], chunks=[]), lambda sequence: None)
            raise
        return told

    def _start_over(self, plan: StepPlan, fault: Callable[[Sequence], None]) -> None:
        """The plan's requests end, fault is told each; the others are computed again on fresh pages."""
        self._in_flight.clear()
        self.scheduler.fail(plan, fault)
        for array in jax.tree.leaves(self._state):  # some may have been donated; there is no room for both
            array.delete()
        self._state = self._fresh_state()

    def _guarded(self, plan: StepPlan, action: Callable[[], None]) -> None:
        """action(); if it throws, the plan's requests fail and the rest start over with empty pages."""
        try:
            action()
        except Exception as error:  # whatever a device or a compiler throws
            fault = StepError(f"a step failed and this request was in it: {error}")
            fault.__cause__ = error
            self._start_over(plan, lambda sequence: self._end(sequence, "error", fault))

    def _dispatch(self, plan: StepPlan) -> None:
        bucket = bucket_of(plan, self.limits, least_rows=self.runner.least_rows, pages=self._row_pages)
        if self.sealed and bucket not in self.buckets:
            raise StepError(
                f"no program was compiled at start-up for {bucket}; there are {sorted(map(str, self.buckets))}"
            )
        packed, places = pack(plan, bucket, self.limits, lambda index: self.requests[index].params)
        drawn = any(self.requests[s.request_id].params.temperature > 0 for s in plan.sampled())
        self._state, tokens, logprobs = self.runner.step(self._state, packed, drawn, bucket)
        self.buckets.add(bucket)
        self._in_flight.append(_InFlight(plan=plan, places=places, tokens=tokens, logprobs=logprobs))

    def _complete(self, step: _InFlight) -> list[Request]:
        tokens, logprobs = np.asarray(step.tokens), np.asarray(step.logprobs)
        drawn = [int(tokens[place]) for place in step.places]
        of = {id(s): float(logprobs[p]) for s, p in zip(step.plan.sampled(), step.places, strict=True)}
        told = []
        for sequence, token in self.scheduler.complete(step.plan, drawn):
            request = self.requests[sequence.request_id]
            request.events.append(request.push(token, of[id(sequence)], self.eos))
            told.append(request)
            self.num_new_tokens += 1
            if request.finish_reason is not None:
                self.scheduler.finish(sequence)
                del self.requests[sequence.request_id]
        return told

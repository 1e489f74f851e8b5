"""The engine loop: schedule a step, dispatch it, process the output of an earlier step. Single-threaded.

The core knows token ids only. api/output_processor.py turns its events into text and ends requests at stop strings.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from jaxmoe.cache.pages import PageCopy
from jaxmoe.engine.batch import BitmaskSource, RequestMetadata, StepBucket, all_buckets, bucket_of, pack, pack_bitmasks
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import RequestFinished, SampledToken, SamplingParams, drawn_seed, seed_of_sample
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.scheduler import PromptChunk, ScheduledSequence, StepPlan, StepScheduler
from jaxmoe.engine.step_programs import StepOutput
from jaxmoe.engine.timing import StepClock
from jaxmoe.engine.trace import EngineTrace, RequestRecord, StepRecord
from jaxmoe.engine.worker import ModelExecutor
from jaxmoe.errors import StepError
from jaxmoe.ops.sampling import SamplerOutput

_TIMINGS = 3


@dataclass(kw_only=True, eq=False)
class EngineRequest:
    """Hold one sample of a request from submission on: its parameters and its tokens so far."""

    index: int
    sample: int
    params: SamplingParams
    sequence: ScheduledSequence
    num_prompt: int
    ends: tuple[int, ...]  # end tokens and stop tokens
    seed: int
    token_bitmask: BitmaskSource | None = None
    record: RequestRecord | None = None
    finish_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens generated so far."""
        return self.sequence.tokens[self.num_prompt :]

    def metadata(self) -> RequestMetadata:
        """Return the metadata that a step needs of this request."""
        return RequestMetadata(
            params=self.params, num_prompt=self.num_prompt, ends=self.ends, seed=self.seed,
            token_bitmask=self.token_bitmask,
        )  # fmt: skip

    def sampled(self, token: int, logprob: float, top: dict[int, float]) -> SampledToken:
        """Return the event of the token that was appended last. Sets finish_reason if no token follows it."""
        if token in self.ends:
            self.finish_reason = "stop"
        elif len(self.sequence.tokens) >= self.sequence.max_total:
            self.finish_reason = "length"
        return SampledToken(
            index=self.index, sample=self.sample, token_id=token, logprob=logprob, top_logprobs=top,
            finish_reason=self.finish_reason, seed=self.seed,
        )  # fmt: skip


def not_finite(runner: ModelRunner, where: str, *, masked: bool = False) -> StepError:
    """Return the error for logits that contain NaN or plus infinity, or only minus infinity.

    where: their origin. masked: whether a token bitmask may have left no token.
    """
    others = {"float16": "bfloat16 or float32", "bfloat16": "float32"}
    remedy = f"load it with dtype {others[runner.dtype]}, or check" if runner.dtype in others else "check"
    mask = f"the token bitmask of {where} allows no token that its logits and biases allow, or " if masked else ""
    return StepError(
        f"{mask}the logits of {where} are not finite: {runner.config.family} in {runner.dtype} overflowed, or its "
        f"weights hold NaN; {remedy} the checkpoint's weights"
    )


@dataclass(kw_only=True)
class _InFlight:
    plan: StepPlan
    slots: list[tuple[int, int]]  # rank and sequence slot of each entry of plan.sampled()
    output: StepOutput
    record: StepRecord | None
    sent: float  # time of dispatch, after its program was compiled
    done_at: float | None = None  # set if known before its output is processed


class EngineCore:
    """Schedule requests, run steps and emit events. Not thread-safe.

    The caller takes the events from the left of `events`, each with its request.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler_config: SchedulerConfig,
        *,
        executor: ModelExecutor | None = None,
        trace: EngineTrace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """executor: runs the steps of the model; by default in this process alone."""
        self.runner, self.scheduler_config = runner, scheduler_config
        self.scheduler = StepScheduler(scheduler_config)
        self.requests: dict[int, EngineRequest] = {}
        self.events: deque[tuple[EngineRequest, SampledToken | RequestFinished]] = deque()
        self.buckets: set[StepBucket] = set()
        self.warmed_up = False
        self.num_new_tokens = 0
        self.timing = StepClock()
        self.trace = trace
        self.on_loads: Callable[[np.ndarray], None] | None = None  # called with physical_loads of each step
        self.copy_s = self.compute_s = 0.0  # seconds of a page: round trip to the host; prefill
        self._clock = clock
        self._pages_per_seq = -(-scheduler_config.context // scheduler_config.page_size)
        self._in_flight: deque[_InFlight] = deque()
        self._next_id = 0
        self._executor = ModelExecutor(runner) if executor is None else executor
        self._worker = self._executor.worker(scheduler_config)

    def _bucket_sizes(self) -> dict[str, int]:
        runner = self.runner
        return {
            "min_seq_slots": runner.min_seq_slots, "pages": self._pages_per_seq, "stages": runner.placement.num_stages,
            "shares": runner.context_ranks, "whole": runner.placement.strip_tokens,
        }  # fmt: skip

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile the program of every bucket. Afterwards a step of any other shape raises StepError."""
        buckets = all_buckets(self.scheduler_config, **self._bucket_sizes())
        on_progress(0, len(buckets))
        for done, bucket in enumerate(buckets, 1):
            nothing = pack(StepPlan(decodes=[], chunks=[]), bucket, self.scheduler_config, self._request_metadata)
            jax.block_until_ready(self._step(nothing, (False, False, False), bucket, 1))
            self.buckets.add(bucket)
            on_progress(done, len(buckets))
        if self.scheduler_config.num_host_pages:
            self.copy_s, self.compute_s = self._time_copies(), self._time_prompts(buckets[-1])
            self.scheduler.enable_offload(self.copy_s < self.compute_s)
        self.warmed_up = True

    def _time_copies(self) -> float:
        """Measure the seconds to copy one page to host memory and back. Compiles both copies."""
        seconds = []
        for _ in range(1 + _TIMINGS):
            start = self._clock()
            for direction in ("out", "in"):
                self._worker.copy_page(0, PageCopy(direction, 0, 0))
            self._worker.wait()
            seconds.append(self._clock() - start)
        return min(seconds[1:])

    def _time_prompts(self, bucket: StepBucket) -> float:
        """Measure the seconds to prefill one page of tokens, in a step with a full chunk of prompt tokens."""
        scheduler_config = self.scheduler_config
        count = min(scheduler_config.chunk_tokens, scheduler_config.context, scheduler_config.pool_tokens)
        pages = list(range(-(-count // scheduler_config.page_size)))
        sequence = ScheduledSequence(
            request_id=-1, tokens=[0] * count, max_total=count + 1, rank=0, slot=0, pages=pages
        )
        plan = StepPlan(decodes=[], chunks=[PromptChunk(sequence=sequence, start=0, count=count, last=True)])
        metadata = RequestMetadata(params=SamplingParams(), num_prompt=count, ends=(), seed=0)
        packed, seconds = pack(plan, bucket, scheduler_config, lambda index: metadata), []
        for _ in range(_TIMINGS):  # writes only to pages that no request uses yet
            start = self._clock()
            jax.block_until_ready(self._step(packed, (False, False, False), bucket, 1))
            seconds.append(self._clock() - start)
        return min(seconds) / len(pages)

    # --- requests ---

    @property
    def busy(self) -> bool:
        """Return whether any request runs or waits, or any step is in flight."""
        return bool(self.requests or self._in_flight)

    def check(self, num_prompt: int, params: SamplingParams) -> None:
        """Raise RequestError if a request of num_prompt tokens could never run to its end."""
        keeps_all = params.reads_history
        max_total = self.scheduler_config.max_total(num_prompt, params.max_tokens, keeps_all=keeps_all)
        self.scheduler.check(num_prompt, max(num_prompt + 1, max_total), keeps_all=keeps_all)

    def drain(self) -> None:
        """Process the steps in flight that an ended request left behind. Requires that no request is left."""
        assert not self.requests
        while self._in_flight:
            self.step()

    def reset_prefix_cache(self) -> None:
        """Drop the prefix cache, in host memory too. Requires that no request is left."""
        self.drain()
        self.scheduler.reset_prefix_cache()
        self._worker.clear_host_pages()

    def free(self) -> None:
        """Free the device arrays. The core cannot run afterwards."""
        self._worker.free()

    def submit(
        self, index: int, ids: list[int], params: SamplingParams, *, ends: tuple[int, ...], name: str = "",
        priority: int = 0, deadline: float | None = None, token_bitmask: BitmaskSource | None = None,
    ) -> list[EngineRequest]:  # fmt: skip
        """Queue a request; each of its n samples becomes one EngineRequest.

        ends: all tokens that end the output. name: shown in traces. deadline: time of the core's clock. token_bitmask:
        see RequestMetadata. Raises: RequestError if the request can never fit.
        """
        most = self.scheduler_config.max_total(len(ids), params.max_tokens, keeps_all=params.reads_history)
        seed = drawn_seed() if params.seed is None else params.seed
        queued = []
        for sample in range(params.n):
            sequence = ScheduledSequence(
                request_id=self._next_id, tokens=list(ids), max_total=most, keeps_all=params.reads_history,
                awaits_tokens=token_bitmask is not None, priority=priority, deadline=deadline,
            )  # fmt: skip
            self.scheduler.add(sequence)
            request = EngineRequest(
                index=index, sample=sample, params=params, sequence=sequence, num_prompt=len(ids), ends=ends,
                seed=seed_of_sample(seed, sample), token_bitmask=token_bitmask,
            )  # fmt: skip
            if self.trace is not None:
                full = name if params.n == 1 else f"{name}, sample {sample}"
                request.record = self.trace.queued(
                    full, num_prompt=len(ids), max_new=most - len(ids), now=self._clock()
                )
            self.requests[self._next_id] = request
            self._next_id += 1
            queued.append(request)
        return queued

    def cancel(self, request: EngineRequest) -> None:
        """Cancel a request. Does nothing if it has ended."""
        if request.finish_reason is None:
            self._end(request.sequence, "cancelled")

    def finish(self, request: EngineRequest, reason: str, *, num_tokens: int) -> None:
        """End a request after its first num_tokens generated tokens, for a reason that the core does not know.

        Releases its slot and its pages, and emits no event. Later tokens of the request do not count; the caller skips
        their events. Full pages of them stay in the prefix cache. The core may have ended the request already.
        """
        request.finish_reason, sequence = reason, request.sequence
        self.requests.pop(sequence.request_id, None)
        self.scheduler.finish(sequence)
        num_dropped = len(request.token_ids) - num_tokens  # of a step without prompts; others sample one
        self.num_new_tokens -= num_dropped
        self.timing.num_decoded_tokens -= num_dropped
        del sequence.tokens[request.num_prompt + num_tokens :]
        if request.record is not None:
            request.record.num_tokens = min(request.record.num_tokens, num_tokens)
        self._trace_end(request)

    def _end(self, sequence: ScheduledSequence, reason: str, error: StepError | None = None) -> None:
        request = self.requests.pop(sequence.request_id)
        self.scheduler.finish(sequence, discard=error is not None)
        request.finish_reason = reason
        self._trace_end(request)
        event = RequestFinished(index=request.index, sample=request.sample, finish_reason=reason, error=error)
        self.events.append((request, event))

    # --- engine loop ---

    def step(self) -> None:
        """Dispatch the next step, and process the output of the previous one: append the new events."""
        try:
            for sequence in self.scheduler.expired(self._clock()):
                self._end(sequence, "deadline")
            plan = self.scheduler.plan()
            if plan:
                self._guarded(plan, lambda: self._dispatch(plan))
            if self._in_flight and (len(self._in_flight) > 1 or not plan):
                step = self._in_flight.popleft()
                self._guarded(step.plan, lambda: self._complete(step), step.record)
        except BaseException:  # interrupted: the planned step may or may not have been dispatched
            self._start_over(StepPlan(decodes=[], chunks=[]), lambda sequence: None)
            raise

    def _start_over(self, plan: StepPlan, fault: Callable[[ScheduledSequence], None]) -> None:
        """End the sequences of a plan, call fault with each, and compute all other requests again on fresh pages."""
        for step in self._in_flight:
            self._trace_failure(step.record)
        self._in_flight.clear()
        self.scheduler.fail(plan, fault)
        self._worker.reset()

    def _guarded(self, plan: StepPlan, action: Callable[[], None], record: StepRecord | None = None) -> None:
        """Run action. If it raises, the requests of the plan fail and all others start over with empty pages."""
        try:
            action()
        except Exception as error:  # any error of a device or a compiler
            fault = self._executor.fault(error)
            fault.__cause__ = error
            self._trace_failure(record)
            self._start_over(plan, lambda sequence: self._end(sequence, "error", fault))

    def _dispatch(self, plan: StepPlan) -> None:
        bucket = bucket_of(plan, self.scheduler_config, **self._bucket_sizes())
        if self.warmed_up and bucket not in self.buckets:
            raise StepError(
                f"no program was compiled at start-up for {bucket}; compiled buckets: {sorted(map(str, self.buckets))}"
            )
        params = [self.requests[sequence.request_id].params for sequence, _ in plan.sampled()]
        features = (
            any(p.temperature > 0 for p in params),
            any(p.adjusts_logits for p in params),
            any(p.top_logprobs for p in params),
        )
        inputs = plan, bucket, self.scheduler_config, self._request_metadata
        packed, bitmask = pack(*inputs), pack_bitmasks(*inputs, vocab_size=self.runner.config.vocab_size)
        slots = [(sequence.rank, sequence.slot) for sequence, _ in plan.sampled()]
        sent = self._clock()
        for rank, page_copy in plan.page_copies:
            self._worker.copy_page(rank, page_copy)
        known = bucket in self.buckets
        start = sent if known else self._settle()
        output = self._step(packed, features, bucket, plan.decode_steps, bitmask)
        self.buckets.add(bucket)
        record = self._trace_step(plan, bucket, sent)
        if not known:  # the call's time is compile time: dispatch is asynchronous
            self.timing.compile_s, start = self.timing.compile_s + self._clock() - start, self._clock()
        self._in_flight.append(_InFlight(plan=plan, slots=slots, output=output, record=record, sent=start))

    def _settle(self) -> float:
        """Wait for the steps in flight, so that step times and compile time do not overlap. Return the current time."""
        with contextlib.suppress(Exception):  # the error of a failed step is raised when its output is processed
            self._worker.wait()
        now = self._clock()
        for step in self._in_flight:
            step.done_at = now
        return now

    def _trace_step(self, plan: StepPlan, bucket: StepBucket, sent: float) -> StepRecord | None:
        if self.trace is None:
            return None
        runner, scheduler = self.runner, self.scheduler
        looped = self.scheduler_config.decode_steps > 1 and not bucket.blocks
        most = self.scheduler_config.decode_steps if looped else 1
        collectives = runner.traffic.planned_run(bucket, decode_steps=plan.decode_steps, max_decode_steps=most)
        return self.trace.sent(
            plan, bucket, {id: r.record for id, r in self.requests.items() if r.record is not None}, collectives,
            waiting=len(scheduler.waiting), pages_in_use=sum(pool.num_in_use for pool in scheduler.pools),
            now=sent,
        )  # fmt: skip

    def _trace_failure(self, record: StepRecord | None) -> None:
        if record is not None:
            record.failed, record.done = True, self._clock()

    def _trace_end(self, request: EngineRequest) -> None:
        if request.record is not None:
            EngineTrace.ended(request.record, request.finish_reason or "", now=self._clock())

    def _request_metadata(self, request_id: int) -> RequestMetadata:
        return self.requests[request_id].metadata()

    def _step(
        self, packed: np.ndarray, features: tuple[bool, bool, bool], bucket: StepBucket, decode_steps: int,
        token_bitmask: np.ndarray | None = None,
    ):  # fmt: skip
        max_decode_steps = 1 if bucket.blocks else self.scheduler_config.decode_steps
        traced = self.trace is not None or self.on_loads is not None
        return self._worker.step(
            packed, features, bucket, decode_steps=decode_steps, max_decode_steps=max_decode_steps,
            traced=traced, token_bitmask=token_bitmask,
        )  # fmt: skip

    def _complete(self, step: _InFlight) -> None:
        tokens, logprobs = np.asarray(step.output.sampled.tokens), np.asarray(step.output.sampled.logprobs)
        done_at = self._clock() if step.done_at is None else step.done_at
        sampled = list(step.plan.sampled())
        sampled_tokens = [tokens[:count, *slot].tolist() for (_, count), slot in zip(sampled, step.slots, strict=True)]
        decode_step = [0] * len(sampled_tokens)
        experts = self.runner.experts
        loads = None if step.output.tokens_per_expert is None else experts.physical_loads(step.output.tokens_per_expert)
        if loads is not None and self.on_loads is not None:
            self.on_loads(loads)
        if loads is not None and self.trace is not None and step.record is not None:
            self.trace.done(step.record, experts.rank_loads(loads), now=self._clock())
        num_new = 0
        for sequence, which, token in self.scheduler.complete(step.plan, sampled_tokens):
            request, at = self.requests[sequence.request_id], (decode_step[which], *step.slots[which])
            decode_step[which] += 1
            if math.isnan(logprobs[at]):
                where = f"prompt {request.index} after {len(sequence.tokens) - 1} tokens"
                error = not_finite(self.runner, where, masked=request.token_bitmask is not None)
                self._end(sequence, "error", error)
                sequence.tokens.pop()
                continue
            top = self._top(step.output.sampled, at, request.params.top_logprobs)
            self.events.append((request, request.sampled(token, float(logprobs[at]), top)))
            num_new += 1
            self.num_new_tokens += 1
            if request.record is not None and step.record is not None:
                request.record.add_token(step.record.index)
            if request.finish_reason is not None:
                self._trace_end(request)
                self.scheduler.finish(sequence)
                del self.requests[sequence.request_id]
        num_prompt = sum(chunk.count for chunk in step.plan.chunks)
        self.timing.done(sent=step.sent, at=done_at, num_prompt=num_prompt, num_new=num_new)

    @staticmethod
    def _top(sampled: SamplerOutput, at: tuple[int, ...], count: int) -> dict[int, float]:
        """Return the top `count` tokens at index `at` with their log-probabilities, likeliest first."""
        if not count:
            return {}
        tokens, logprobs = np.asarray(sampled.top_tokens)[at], np.asarray(sampled.top_logprobs)[at]
        return dict(zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True))

"""The one engine core of a loaded model, shared by LLM.generate and by an AsyncEngine on the same LLM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from jaxmoe.api.output_processor import OutputProcessor, RequestState
from jaxmoe.engine.core import EngineCore
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.trace import EngineTrace
from jaxmoe.engine.worker import ModelExecutor
from jaxmoe.errors import ConfigError, RequestError
from jaxmoe.text.eos import special_stop_ids
from jaxmoe.text.tokenizer import CheckpointTokenizer

_WAIT_SECONDS = 1.0  # for the engine's thread, before looking again whether there is one


class SharedCore:
    """Own the EngineCore of one ModelRunner: one KV cache, one prefix cache, one scheduler; and its OutputProcessor.

    Hold `lock` around every call of the core. Requests enter and leave it by `submit`, `step` and `cancel`, which turn
    its events into text. Without an AsyncEngine, threads of LLM.generate run the steps, and the core grows with their
    requests. An AsyncEngine fixes its size from `reserve` to `release`, as its programs are compiled by then, and its
    thread runs the steps of all requests: `wake` asks it to, `stepped` tells of each step.
    """

    def __init__(self, executor: ModelExecutor, *, tokenizer: CheckpointTokenizer | None, eos: frozenset[int]) -> None:
        self.lock = threading.RLock()
        self.stepped = threading.Condition(self.lock)
        self.core: EngineCore | None = None
        self.reserved = False  # by an AsyncEngine
        self._wake: Callable[[], None] = lambda: None
        self._traced = False  # whether the engine's programs count tokens per expert
        self.executor, self._runner, self._tokenizer, self._eos = executor, executor.runner, tokenizer, eos
        self._processor = OutputProcessor(tokenizer)
        self._in_step = False
        self._cancelled: list[tuple[EngineCore, RequestState]] = []

    def submit(
        self, core: EngineCore, index: int, ids: list[int], params: SamplingParams, *, name: str, priority: int = 0,
        deadline: float | None = None,
    ) -> list[RequestState]:  # fmt: skip
        """Queue a request on a core, as EngineCore.submit, and return one state for each of its samples. Hold `lock`.

        It ends at end tokens of the model, unless ignored, at stop tokens, and at stop strings that are special tokens.
        """
        special = special_stop_ids(self._tokenizer, params.stop, vocab_size=self._runner.config.vocab_size)
        ends = tuple({*params.stop_token_ids, *special, *(() if params.ignore_eos else self._eos)})
        requests = core.submit(index, ids, params, ends=ends, name=name, priority=priority, deadline=deadline)
        return [self._processor.add(request) for request in requests]

    def step(self, core: EngineCore) -> None:
        """Run the next step of a core and process its events. Hold `lock`."""
        self._in_step = True
        try:
            core.step()
        finally:
            try:
                self._processor.process(core)
            finally:
                self._in_step = False
                self._cancel_all()

    def cancel(self, core: EngineCore, states: Iterable[RequestState]) -> None:
        """Cancel requests that have not ended.

        A stream may be garbage-collected at any time, even by the thread that runs a step. Its requests are then
        cancelled after the step.
        """
        with self.lock:
            self._cancelled += [(core, state) for state in states]
            if not self._in_step:
                self._cancel_all()

    def _cancel_all(self) -> None:
        while self._cancelled:
            core, state = self._cancelled.pop(0)
            core.cancel(state.request)
            self._processor.process(core)

    def run_step(self, core: EngineCore) -> None:
        """Run the next step of a core, or let the engine's thread do so and wait for it. Hold `lock`."""
        if self.reserved and self.core is core:
            self._wake()
            self.stepped.wait(timeout=_WAIT_SECONDS)
        else:
            self.step(core)

    def fixed(self, requests: Sequence[tuple[int, SamplingParams]], *, max_num_seqs: int) -> EngineCore | None:
        """Return the core that an AsyncEngine reserved, or left if it holds these requests to their ends; else None.

        requests: prompt tokens and sampling parameters of each. max_num_seqs: of them that are to run at once. A
        reserved core refuses a request that it cannot hold, and ends answers at its own context.
        """
        with self.lock:
            core = self.core
            if core is None or not core.warmed_up:
                return None
            if self.reserved:
                return core
            slots = core.scheduler_config.max_num_seqs * core.scheduler_config.num_ranks
            wanted = min(sum(params.n for _, params in requests), max_num_seqs)
            return core if wanted <= slots and all(self._holds(core, *request) for request in requests) else None

    def _holds(self, core: EngineCore, num_prompt: int, params: SamplingParams) -> bool:
        """Return whether a core runs a request to the end that the model's own context gives it."""
        longest = self._runner.config.max_position_embeddings
        wanted = longest if params.max_tokens is None else min(longest, num_prompt + params.max_tokens)
        keeps_all = params.reads_history
        if core.scheduler_config.max_total(num_prompt, params.max_tokens, keeps_all=keeps_all) < wanted:
            return False
        try:
            core.check(num_prompt, params)
        except RequestError:
            return False
        return True

    def fit(self, scheduler_config: SchedulerConfig) -> EngineCore:
        """Return a core of this size for LLM.generate: the present one where it has that size, otherwise a new one."""
        with self.lock:
            assert not self.reserved
            if self.core is None or self.core.scheduler_config != scheduler_config:
                return self._make(scheduler_config)
            return self.core

    def _make(self, scheduler_config: SchedulerConfig) -> EngineCore:
        old, self.core = self.core, None
        if old is not None and not old.requests:
            old.free()  # before new pages are allocated, even if somebody holds the old core
        self.core = EngineCore(self._runner, scheduler_config, executor=self.executor)
        return self.core

    def reserve(
        self, scheduler_config: SchedulerConfig, *, trace: EngineTrace | None, wake: Callable[[], None]
    ) -> EngineCore:
        """Return a core of exactly this size for an AsyncEngine, and keep LLM.generate from replacing it.

        A core of the same size that an earlier AsyncEngine left is taken over with its programs and prefix cache,
        unless one of both engines has a trace, which needs other programs. wake: called, from any thread, if the
        engine's thread has steps to run. Raises: ConfigError if another AsyncEngine runs on this LLM, or requests of
        LLM.generate do.
        """
        with self.lock:
            if self.reserved:
                raise ConfigError("an AsyncEngine runs on this LLM already: close it first, or share it")
            if self.core is not None and self.core.requests:
                raise ConfigError("this LLM has requests that run: start the AsyncEngine before them, or after")
            core, traced = self.core, trace is not None
            if core is not None:
                core.drain()
            reusable = core is not None and core.warmed_up and not traced and not self._traced
            if core is None or not reusable or core.scheduler_config != scheduler_config:
                core = self._make(scheduler_config)
            core.trace, core.on_loads = trace, None
            self.reserved, self._traced, self._wake = True, traced, wake
            return core

    def release(self, *, discard: bool = False) -> None:
        """Let LLM.generate replace the core, and run its steps, again. Its pages and prefix cache stay.

        discard: drop the core, whose state is unknown after a fault.
        """
        with self.lock:
            self.reserved, self._wake = False, lambda: None
            if discard:
                self.core = None
            elif self.core is not None:
                self.core.trace = None
            self.stepped.notify_all()

    @property
    def device_bytes(self) -> int:
        """Return the bytes of pages of the core on each device; 0 without a core."""
        with self.lock:
            tokens = 0 if self.core is None else self.core.scheduler_config.pool_tokens
            return tokens * self._runner.device_bytes_per_token // self._runner.context_ranks

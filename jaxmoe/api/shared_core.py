"""The one engine core of a loaded model, shared by LLM.generate and by an AsyncEngine on the same LLM."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from jaxmoe.engine.core import EngineCore
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.runner import Runner
from jaxmoe.engine.tokenizer import Tokenizer
from jaxmoe.engine.trace import Trace
from jaxmoe.errors import ConfigError, RequestError


class SharedCore:
    """Own the EngineCore of one Runner: one KV cache, one prefix cache, one scheduler.

    Hold `lock` around every call of the core: one thread at a time schedules and runs steps; a request's events may be
    produced by a step that another thread runs. Without an AsyncEngine the core grows with the requests of
    LLM.generate. An AsyncEngine fixes its size from `reserve` to `release`: its programs are compiled by then.
    """

    def __init__(self, runner: Runner, *, tokenizer: Tokenizer | None, eos: frozenset[int]) -> None:
        self.lock = threading.RLock()
        self.core: EngineCore | None = None
        self.reserved = False  # by an AsyncEngine
        self._runner, self._tokenizer, self._eos = runner, tokenizer, eos

    def fixed(self, requests: Iterable[tuple[int, SamplingParams]]) -> EngineCore | None:
        """Return the core that an AsyncEngine reserved, or left if it holds these requests to their ends; else None.

        requests: prompt tokens and sampling parameters of each. A reserved core refuses one that it cannot hold, and
        ends answers at its own context.
        """
        with self.lock:
            core = self.core
            if core is None or not core.warmed_up:
                return None
            holds_all = self.reserved or all(self._holds(core, *request) for request in requests)
            return core if holds_all else None

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
        self.core = None  # its pages are freed before new ones are allocated
        self.core = EngineCore(self._runner, scheduler_config, tokenizer=self._tokenizer, eos=self._eos)
        return self.core

    def reserve(self, scheduler_config: SchedulerConfig, *, trace: Trace | None) -> EngineCore:
        """Return a core of exactly this size for an AsyncEngine, and keep LLM.generate from replacing it.

        A core of the same size that an earlier AsyncEngine left is taken over with its programs and prefix cache,
        unless a trace is wanted, which needs other programs. Raises: ConfigError if another AsyncEngine runs on this
        LLM, or requests of LLM.generate do.
        """
        with self.lock:
            if self.reserved:
                raise ConfigError("an AsyncEngine runs on this LLM already: close it first, or share it")
            if self.core is not None and self.core.busy:
                raise ConfigError("this LLM has requests that run: start the AsyncEngine before them, or after")
            core = self.core
            reusable = core is not None and core.warmed_up and trace is None
            if core is None or not reusable or core.scheduler_config != scheduler_config:
                core = self._make(scheduler_config)
            core.trace, core.on_loads = trace, None
            self.reserved = True
            return core

    def release(self, *, discard: bool = False) -> None:
        """Let LLM.generate replace the core again. Its pages and prefix cache stay until another size is needed.

        discard: drop the core, whose state is unknown after a fault.
        """
        with self.lock:
            self.reserved = False
            if discard:
                self.core = None
            elif self.core is not None:
                self.core.trace = None

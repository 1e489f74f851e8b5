"""The asynchronous serving API: many concurrent requests, with the engine loop in its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxmoe.api.inputs import Prompt
from jaxmoe.api.llm import LLM
from jaxmoe.api.output_processor import RequestState
from jaxmoe.api.outputs import TokenEvent
from jaxmoe.api.process_calls import ResultCodecs, received, send_result
from jaxmoe.checks import is_finite
from jaxmoe.config import EngineConfig, EngineOptions
from jaxmoe.config.engine import SERVING_OPTIONS, checked_config
from jaxmoe.engine.batch import whole_blocks
from jaxmoe.engine.core import EngineCore
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import RequestFinished, SamplingParams
from jaxmoe.engine.trace import EngineTrace, check_trace_path, trace_facts
from jaxmoe.errors import ConfigError, ProcessLostError, RequestError, StepError
from jaxmoe.parallel.processes import joined
from jaxmoe.weights.source import DEFAULT_MODEL

_CLOSE = "AsyncEngine.close"
_DEFAULT_CPU_GIB = 1.0
_DEFAULT_SHARE = 0.9  # of the memory an accelerator has left after the weights


@contextlib.contextmanager
def _compile_bar(scheduler_config: SchedulerConfig, llm: LLM) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of compiled programs on standard error, if standard error is a terminal."""
    console = Console(stderr=True, highlight=False)
    tokens, each = scheduler_config.pool_tokens * scheduler_config.num_ranks, llm._runner.bytes_per_token
    label = f"pages for {tokens} tokens of {each} bytes ({tokens * each / 2**30:.2f} GiB); compiling steps"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class AsyncEngine:
    """Serve requests concurrently from asynchronous code, with continuous batching.

    Start-up compiles every program that the engine runs. Use the engine as a context manager, or call close(). Of
    joined processes, process 0 streams requests; the others make an engine too, and close() follows process 0.

    Args:
        model: As in LLM, or a loaded LLM. An engine on a loaded LLM shares its KV cache and prefix cache with
            LLM.generate; one engine at a time can run on an LLM.
        config: Options of loading and serving. By default those of the LLM, or of EngineConfig.
        trace: A file to which close() writes a trace, next to an HTML page (engine/trace.py).
        on_progress: Called with (bytes of parameters loaded, total bytes) as files are read.
        on_compile: Called at start-up with (programs compiled, total programs). By default a progress bar shows both on
            a terminal, with the size of the KV cache.
        **options: Options of EngineConfig by their own names, in place of those of `config`: `max_num_seqs=16`,
            `context=4096`, `kv_cache_gib=8`, `host_cache_gib=32`, `mesh="tensor=2"`, ...

    Raises:
        ConfigError: If a size is out of range, the KV cache does not fit, options of loading are given with a loaded
            LLM, or another engine runs on it.
        RequestError: If the trace file cannot be written.
        JaxmoeError: As in LLM.
    """

    def __init__(
        self,
        model: str | Path | LLM = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        trace: str | Path | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_compile: Callable[[int, int], None] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        engine_config = _engine_config(model, config, options)
        self._trace_path = None if trace is None else check_trace_path(trace)
        self.llm = model if isinstance(model, LLM) else LLM(model, engine_config, on_progress=on_progress)
        self.engine_config, self._group = engine_config, joined()
        self._scheduler_config = _scheduler_config(self.llm, engine_config)
        self._shared = self.llm._shared
        self._closed = self._is_close_sent = False
        if self.llm.follows:
            return
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        with self._shared.lock:  # LLM.generate of other threads waits until the programs are compiled
            self._core = self._reserve(None if trace is None else EngineTrace(trace_facts(self.llm._runner)))
            try:
                self._warm_up(on_compile)
            except BaseException:
                self._shared.release(discard=True)
                raise
        self._trace = self._core.trace  # the core drops it when the engine's thread ends
        self._ids = itertools.count()
        self._event_queues: dict[str, _EventQueue] = {}
        self._lock = threading.Lock()  # guards _closed and _event_queues
        if self._group is not None:
            self._group.on_lost.append(self._lose)
        self._thread = threading.Thread(target=self._run, name="jaxmoe-engine", daemon=True)
        self._thread.start()

    def _reserve(self, trace: EngineTrace | None) -> EngineCore:
        if trace is not None and self.llm._trace is not None:
            raise ConfigError("LLM.trace records this LLM already: leave its with-statement, or remove trace")
        try:
            return self._shared.reserve(
                self._scheduler_config, trace=trace, wake=lambda: self._commands.put(lambda: None)
            )
        except RequestError as error:
            given = f"kv_cache_gib={self.engine_config.cache.kv_cache_gib}"
            raise ConfigError(f"{given} is more than the devices have free: {error}") from error

    def _warm_up(self, on_compile: Callable[[int, int], None] | None) -> None:
        if self._core.warmed_up:  # by an earlier engine of the same size on this LLM
            return
        bar = contextlib.nullcontext(on_compile) if on_compile else _compile_bar(self._scheduler_config, self.llm)
        with bar as report:
            self._core.warm_up(report)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Submit a request and stream its tokens: `async for event in engine.stream(...)`.

        Call it from a coroutine. The request is cancelled when its stream is closed or garbage-collected.

        Args:
            prompt: A text or token ids.
            params: Sampling parameters.
            request_id: Name of the request, for cancel and for traces. By default a new name.
            priority: Requests of lower priority values are served first.
            timeout_s: Seconds from now after which the request ends.

        Returns:
            An asynchronous iterator over the token events of all n samples.

        Raises:
            RequestError: At the call, if an argument is out of range, the request can never fit, request_id is in use,
                the engine is closed, or no event loop is running.
            StepError: While iterating, if a step that computed the request failed, its logits are not finite, or it was
                cancelled or timed out.
        """
        if self.llm.follows:
            raise RequestError("this process follows process 0: stream requests there, and close the engine here")
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {params!r:.60}")
        ((ids, _),) = self.llm._check_inputs([prompt], params)
        self._core.check(len(ids), params)
        if type(priority) is not int:
            raise RequestError(f"priority={priority!r} must be a whole number")
        if timeout_s is not None and not (is_finite(timeout_s) and timeout_s >= 0):
            raise RequestError(f"timeout_s={timeout_s!r} must be a number of seconds of at least 0")
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id={request_id!r} must be text")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed: make a new one")
            name = f"request-{next(self._ids)}" if request_id is None else request_id
            if name in self._event_queues:
                raise RequestError(f"request_id={name!r} is in use: choose another")
            event_queue = _EventQueue(name)
            self._event_queues[name] = event_queue
            self._commands.put(lambda: self._submit(event_queue, ids, params, priority, deadline))
        return RequestStream(event_queue, params.n, lambda: self._commands.put(lambda: self._cancel(event_queue)))

    def cancel(self, request_id: str) -> None:
        """Cancel a request and release its pages. Does nothing if the id is unknown or the request has ended.

        Args:
            request_id: Id of the request, as given to stream or as RequestStream.request_id.
        """
        with self._lock:  # so that the command is queued after the submission of the request
            event_queue = self._event_queues.get(request_id)
            if event_queue is not None:
                self._commands.put(lambda: self._cancel(event_queue))

    def stats(self) -> dict[str, Any]:
        """Return statistics of the engine.

        Returns:
            Totals since the engine core was created, with the requests of LLM.generate: steps, new_tokens,
            prompt_tokens, cached_prompt_tokens, prefix_hit_rate (a fraction of prompt_tokens), preemptions,
            pages_evicted and pages_swapped_in. Current numbers: running, waiting, pages_in_use and pages_on_host.
            Sizes over all ranks of the batch: num_pages and pool_tokens. Sizes of one page and one token: page_size in
            tokens, and bytes_per_token over all devices that share a rank.
        """
        scheduler, scheduler_config = self._core.scheduler, self._scheduler_config
        prompt = scheduler.num_prompt_tokens
        return {
            "running": len(scheduler.running), "waiting": len(scheduler.waiting), "steps": scheduler.num_steps,
            "new_tokens": self._core.num_new_tokens, "prompt_tokens": prompt,
            "cached_prompt_tokens": scheduler.num_cached_tokens,
            "prefix_hit_rate": scheduler.num_cached_tokens / prompt if prompt else 0.0,
            "preemptions": scheduler.num_preemptions,
            "pages_in_use": sum(pool.num_in_use for pool in scheduler.pools),
            "pages_evicted": scheduler.num_evicted,
            "pages_on_host": sum(pool.num_on_host for pool in scheduler.pools),
            "pages_swapped_in": scheduler.num_swapped_in,
            "num_pages": scheduler_config.num_pages * scheduler_config.num_ranks,
            "page_size": scheduler_config.page_size,
            "pool_tokens": scheduler_config.pool_tokens * scheduler_config.num_ranks,
            "bytes_per_token": self.llm._runner.bytes_per_token,
        }  # fmt: skip

    def close(self) -> None:
        """Cancel all requests, stop the engine thread, and write the trace if one was requested.

        Raises:
            RequestError: If the trace cannot be written.
        """
        if self.llm._followed is not None:
            if not self._closed:
                self._closed = True
                received(self.llm._followed, _CLOSE, ResultCodecs.NOTHING)
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()
        if not self._is_close_sent:
            self._is_close_sent = True
            send_result(self._shared.executor, _CLOSE, ResultCodecs.NOTHING, None)
        trace, self._trace = self._trace, None
        if self._trace_path is not None and trace is not None:
            trace.write(self._trace_path)

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lose(self, line: str) -> None:
        """End all requests because another process was lost. The steps may never return."""
        for event_queue in list(self._event_queues.values()):
            lost = ProcessLostError(line)
            event_queue.put(RequestFinished(index=0, sample=0, finish_reason="error", error=lost))

    # --- in the engine thread ---

    def _run(self) -> None:
        try:
            self._serve()
            reason, fault = "cancelled", None
        except Exception as error:  # the engine cannot go on: raise in every stream rather than hang
            reason, fault = "error", StepError(f"the engine stopped: {error}")
            fault.__cause__ = error
        self._shared.release(discard=fault is not None)
        with self._lock:
            self._closed = True
            left = list(self._event_queues.values())
        for event_queue in left:
            event_queue.put(RequestFinished(index=0, sample=0, finish_reason=reason, error=fault))

    def _serve(self) -> None:
        while True:
            while not (self._core.busy or self._has_requests()) or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    for event_queue in list(self._event_queues.values()):
                        self._cancel(event_queue)
                    return
                command()
            with self._shared.lock:
                if self._core.busy:
                    self._shared.step(self._core)  # also the requests of LLM.generate
                self._shared.stepped.notify_all()
            for event_queue in list(self._event_queues.values()):
                self._publish(event_queue)

    def _has_requests(self) -> bool:
        """Return whether any request of this engine runs, waits or has events that are not published yet."""
        return any(event_queue.states for event_queue in list(self._event_queues.values()))

    def _submit(
        self, event_queue: _EventQueue, ids: list[int], params: SamplingParams, priority: int, deadline: float | None
    ) -> None:
        with self._shared.lock:
            event_queue.states = self._shared.submit(
                self._core, 0, ids, params, name=event_queue.request_id, priority=priority, deadline=deadline
            )

    def _cancel(self, event_queue: _EventQueue) -> None:
        self._shared.cancel(self._core, event_queue.states)
        self._publish(event_queue)

    def _publish(self, event_queue: _EventQueue) -> None:
        for state in list(event_queue.states):
            while state.events:
                event = state.events.popleft()
                if event.finish_reason is not None:
                    event_queue.states.remove(state)
                    if not event_queue.states:
                        self._event_queues.pop(event_queue.request_id, None)
                event_queue.put(event)


class _EventQueue:
    """Pass the events of one request from the engine thread to its asynchronous consumer."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.states: list[RequestState] = []  # samples that have not ended
        self.events: asyncio.Queue[TokenEvent | RequestFinished] = asyncio.Queue()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RequestError("engine.stream is for asynchronous code: call it inside a coroutine") from None

    def put(self, event: TokenEvent | RequestFinished) -> None:
        """Add an event. Called by the engine thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so there is no consumer
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class RequestStream:
    """Iterate asynchronously over the token events of one request, for a single consumer.

    The iteration ends after the last token of the last sample. The request is cancelled when the iteration is left
    early or the stream is garbage-collected.
    """

    def __init__(self, event_queue: _EventQueue, num_samples: int, end: Callable[[], None]) -> None:
        self.request_id = event_queue.request_id
        self._events = event_queue.events
        self._end = weakref.finalize(self, end)
        self._end.atexit = False
        self._num_left = num_samples

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        try:
            while self._num_left:
                event = await self._events.get()
                self._num_left -= event.finish_reason is not None
                if isinstance(event, RequestFinished):
                    self._num_left = 0
                    raise event.error or StepError(f"{self.request_id} was ended: {event.finish_reason}")
                yield event
        finally:
            self._end()


def _engine_config(model: str | Path | LLM, config: EngineConfig | None, options: Mapping[str, Any]) -> EngineConfig:
    """Return the options of an engine. Raises: ConfigError for options of loading with an LLM that is loaded."""
    if not isinstance(model, LLM):
        return checked_config(config).with_options(options)
    engine_config = (model.engine_config if config is None else checked_config(config)).with_options(options)
    loaded, given, default = (each.options() for each in (model.engine_config, engine_config, EngineConfig()))
    loading = [name for name in given if name not in SERVING_OPTIONS]
    named = [name for name in loading if name in options or given[name] not in (loaded[name], default[name])]
    if named:
        raise ConfigError(
            f"{', '.join(named)}: options of loading were given with an LLM, which is loaded already; remove them"
        )
    return engine_config


def _scheduler_config(llm: LLM, config: EngineConfig) -> SchedulerConfig:
    """Return the sizes of the core. Raises: ConfigError naming a value that the model or the devices cannot hold."""
    runner, longest = llm._runner, llm.config.max_position_embeddings
    context = longest if config.context is None else config.context
    if context > longest:
        raise ConfigError(f"context={context} must lie in [1, {longest}], the model's own")
    cache, page_size = config.cache, config.cache.page_size
    kv_cache_gib = _spare_gib(llm) if cache.kv_cache_gib is None else cache.kv_cache_gib
    token_bytes = runner.device_bytes_per_token
    num_pages = int(kv_cache_gib * 2**30 / (token_bytes * page_size))
    if num_pages < 1:
        raise ConfigError(f"kv_cache_gib={kv_cache_gib} does not hold one page of {page_size} tokens: increase it")
    page_size *= runner.context_ranks
    seq_slots = runner.padded_num_seqs(config.max_num_seqs) // runner.num_ranks
    chunk_tokens, block_tokens = whole_blocks(config.chunk_tokens, runner.block_shares)
    return SchedulerConfig(
        num_ranks=runner.num_ranks,
        max_num_seqs=seq_slots,
        chunk_tokens=chunk_tokens,
        block_tokens=block_tokens,
        num_pages=min(num_pages, seq_slots * -(-context // page_size)),
        page_size=page_size,
        context=context,
        decode_steps=config.decode_steps,
        window=runner.config.visible_span[0],
        attention_chunk=runner.config.visible_span[1],
        num_host_pages=int(cache.host_cache_gib * 2**30 / (runner.bytes_per_token * page_size * runner.num_ranks)),
    )


def _spare_gib(llm: LLM) -> float:
    """Return the default GiB of each device for the KV cache; the cache that is there already counts as free."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _DEFAULT_CPU_GIB
    free = stats["bytes_limit"] - stats["bytes_in_use"] + llm._shared.device_bytes
    return _DEFAULT_SHARE * free / 2**30

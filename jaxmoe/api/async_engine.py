"""Many requests at once, from asynchronous code: the loop of the engine runs in a thread of its own."""

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
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxmoe.api.llm import LLM, Prompt
from jaxmoe.engine.batch import CHUNK_TOKENS, MAX_DECODE_STEPS, PAGE_SIZE, whole_blocks
from jaxmoe.engine.core import Request, RequestFinished
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import SamplingParams, TokenEvent, is_finite
from jaxmoe.engine.trace import Trace, check_trace_path
from jaxmoe.errors import ConfigError, RequestError, StepError
from jaxmoe.weights.source import DEFAULT_MODEL

_DEFAULT_CPU_GIB = 1.0
_DEFAULT_SHARE = 0.9  # of the memory an accelerator has left after the weights


@contextlib.contextmanager
def _compile_bar(scheduler_config: SchedulerConfig, llm: LLM) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error for programs compiled at start-up; nothing where that is not a terminal."""
    console = Console(stderr=True, highlight=False)
    tokens, each = scheduler_config.pool_tokens * scheduler_config.num_ranks, llm.runner.bytes_per_token
    label = f"pages for {tokens} tokens of {each} bytes ({tokens * each / 2**30:.2f} GiB); compiling steps"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class AsyncEngine:
    """A model that serves requests as they come. Start-up compiles every program it will run.

    model, mesh, dtype and what else `load` names: as LLM.load. max_num_seqs: run at once, over all ranks of the batch;
    rounded up. context: tokens of a request at most; the model's own by default. kv_cache_gib: for keys and values on
    each device; by default 1 on a CPU, 90% of what is left on an accelerator. host_cache_gib: of host memory, for
    pages that are taken off the devices and come back instead of being computed again, where that is measured to be
    cheaper. page_size: tokens; as many on each rank of a context. chunk_tokens: of prompts, a step and rank.
    decode_steps: tokens that a request decodes in one step where no prompt waits. on_compile is told (programs ready,
    programs in all) at start-up; by default a bar shows them on a terminal, with the size of the pool. trace: a file
    that close() writes what happened to, with a page beside it (engine/trace.py).
    Raises: as LLM.load, and ConfigError for sizes that cannot be.
    """

    def __init__(
        self,
        model: str | Path | LLM = DEFAULT_MODEL,
        *,
        mesh: str | Mapping[str, int] | Mesh | None = None,
        dtype: str | None = None,
        max_num_seqs: int = 32,
        context: int | None = None,
        kv_cache_gib: float | None = None,
        host_cache_gib: float = 0.0,
        page_size: int = PAGE_SIZE,
        chunk_tokens: int = CHUNK_TOKENS,
        decode_steps: int = MAX_DECODE_STEPS,
        trace: str | Path | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        **load: Any,
    ) -> None:
        if isinstance(model, LLM) and (mesh is not None or dtype is not None or load):
            raise ConfigError(
                "mesh, dtype and other options of loading were given with an LLM, which is loaded already"
            )
        self._trace_path = None if trace is None else check_trace_path(trace)
        self.llm = model if isinstance(model, LLM) else LLM.load(model, mesh=mesh, dtype=dtype, **load)
        self._scheduler_config = _scheduler_config(
            self.llm, max_num_seqs=max_num_seqs, context=context, kv_cache_gib=kv_cache_gib, page_size=page_size,
            chunk_tokens=chunk_tokens, decode_steps=decode_steps, host_cache_gib=host_cache_gib,
        )  # fmt: skip
        self._shared = self.llm._shared
        try:
            self._core = self._shared.reserve(
                self._scheduler_config, trace=None if trace is None else Trace(self.llm.trace_facts())
            )
        except RequestError as error:
            raise ConfigError(f"kv_cache_gib={kv_cache_gib} is more than the devices have: {error}") from error
        try:
            self._warm_up(on_compile)
        except BaseException:
            self._shared.release()
            raise
        self._ids = itertools.count()
        self._event_queues: dict[str, _EventQueue] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # around _closed and the names in use
        self._closed = self._released = self._failed = False
        self._thread = threading.Thread(target=self._run, name="jaxmoe-engine", daemon=True)
        self._thread.start()

    def _warm_up(self, on_compile: Callable[[int, int], None] | None) -> None:
        if self._core.warmed_up:  # by an earlier engine of the same size on this LLM
            return
        bar = contextlib.nullcontext(on_compile) if on_compile else _compile_bar(self._scheduler_config, self.llm)
        with self._shared.lock, bar as report:
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
        """The tokens of one request as they come: `async for event in engine.stream(...)`.

        priority: lower is served first. timeout_s: seconds from now after which the request ends.
        Raises: RequestError at the call for a prompt or value out of range, an id that is in use, or a request that can
        never fit; StepError while listening if a step failed with it, its logits are not finite, or the engine ended
        it.
        """
        ids = self.llm.checked_prompt(prompt, params)
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
        """End a request; its pages are free at once. An unknown or ended one is left alone."""
        with self._lock:  # behind the request itself, where that is being queued now
            event_queue = self._event_queues.get(request_id)
            if event_queue is not None:
                self._commands.put(lambda: self._cancel(event_queue))

    def stats(self) -> dict[str, Any]:
        """Counts since start-up, and what is held now."""
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
            "bytes_per_token": self.llm.runner.bytes_per_token,
        }  # fmt: skip

    def close(self) -> None:
        """End every request and the thread; write the trace where one was asked for."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()
        trace = self._core.trace
        if not self._released:
            self._released = True
            self._shared.release(discard=self._failed)
        if self._trace_path is not None and trace is not None:
            trace.write(self._trace_path)

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            self._serve()
            reason, fault = "cancelled", None
        except Exception as error:  # nothing is left to serve with: say so to everyone rather than fall silent
            self._failed = True
            reason, fault = "error", StepError(f"the engine stopped: {error}")
            fault.__cause__ = error
        with self._lock:
            self._closed = True
            left = list(self._event_queues.values())
        for event_queue in left:
            event_queue.put(RequestFinished(index=0, sample=0, finish_reason=reason, error=fault))

    def _serve(self) -> None:
        while True:
            while not self._has_requests() or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    for event_queue in list(self._event_queues.values()):
                        self._cancel(event_queue)
                    return
                command()
            with self._shared.lock:
                if self._core.busy:  # LLM.generate in another thread may have run the last step
                    self._core.step()
            for event_queue in list(self._event_queues.values()):
                self._publish(event_queue)

    def _has_requests(self) -> bool:
        """Return whether any request runs, waits or has events that are not published yet."""
        return any(event_queue.requests for event_queue in list(self._event_queues.values()))

    def _submit(
        self, event_queue: _EventQueue, ids: list[int], params: SamplingParams, priority: int, deadline: float | None
    ) -> None:
        with self._shared.lock:
            event_queue.requests = self._core.submit(
                0, ids, params, name=event_queue.request_id, priority=priority, deadline=deadline
            )

    def _cancel(self, event_queue: _EventQueue) -> None:
        with self._shared.lock:
            for request in event_queue.requests:
                self._core.cancel(request)
        self._publish(event_queue)

    def _publish(self, event_queue: _EventQueue) -> None:
        for request in list(event_queue.requests):
            while request.events:
                event = request.events.popleft()
                if event.finish_reason is not None:
                    event_queue.requests.remove(request)
                    if not event_queue.requests:
                        self._event_queues.pop(event_queue.request_id, None)
                event_queue.put(event)


class _EventQueue:
    """Queue of one request's events, from the engine's thread to its asynchronous consumer."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.requests: list[Request] = []  # that have not ended
        self.events: asyncio.Queue[TokenEvent | RequestFinished] = asyncio.Queue()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RequestError("engine.stream is for asynchronous code: call it inside a coroutine") from None

    def put(self, event: TokenEvent | RequestFinished) -> None:
        """Add an event. Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class RequestStream:
    """The tokens of one request, for one listener. Ends after the event that ends its last sample.

    A request whose stream nobody listens to any more, or holds any more, ends.
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


def _scheduler_config(
    llm: LLM, *, max_num_seqs: int, context: int | None, kv_cache_gib: float | None, page_size: int, chunk_tokens: int,
    decode_steps: int, host_cache_gib: float,
) -> SchedulerConfig:  # fmt: skip
    """The engine's limits from what a user asked for. Raises: ConfigError naming the value that cannot be."""
    runner, longest = llm.runner, llm.config.max_position_embeddings
    context = longest if context is None else context
    named = {
        "max_num_seqs": max_num_seqs, "context": context, "page_size": page_size, "chunk_tokens": chunk_tokens,
        "decode_steps": decode_steps,
    }  # fmt: skip
    for name, value in named.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    if context > longest:
        raise ConfigError(f"context={context} must lie in [1, {longest}], the model's own")
    if kv_cache_gib is None:
        kv_cache_gib = _spare_gib()
    for name, gib in (("kv_cache_gib", kv_cache_gib), ("host_cache_gib", host_cache_gib)):
        if not (is_finite(gib) and 0 <= gib < 2**40):
            raise ConfigError(f"{name}={gib!r} must be a number of at least 0")
    token_bytes = runner.device_bytes_per_token
    num_pages = int(kv_cache_gib * 2**30 / (token_bytes * page_size))
    if num_pages < 1:
        raise ConfigError(f"kv_cache_gib={kv_cache_gib} does not hold one page of {page_size} tokens: give more")
    page_size *= runner.context_ranks
    seq_slots = runner.padded_num_seqs(max_num_seqs) // runner.num_ranks
    chunk_tokens, block_tokens = whole_blocks(chunk_tokens, runner.block_shares)
    return SchedulerConfig(
        num_ranks=runner.num_ranks,
        max_num_seqs=seq_slots,
        chunk_tokens=chunk_tokens,
        block_tokens=block_tokens,
        num_pages=min(num_pages, seq_slots * -(-context // page_size)),
        page_size=page_size,
        context=context,
        decode_steps=decode_steps,
        window=runner.config.visible_span[0],
        attention_chunk=runner.config.visible_span[1],
        num_host_pages=int(host_cache_gib * 2**30 / (runner.bytes_per_token * page_size * runner.num_ranks)),
    )


def _spare_gib() -> float:
    """Memory for pages where the user named none."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return _DEFAULT_CPU_GIB
    return _DEFAULT_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]) / 2**30

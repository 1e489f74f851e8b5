"""Traces of the engine: a record of every request and step, written for Perfetto and as an HTML page.

A trace is one JSON file in Chrome's trace format (open it at ui.perfetto.dev or chrome://tracing) and one
self-contained HTML page. For each request both show when it was queued, which chunks of its prompt ran in which step,
when its tokens arrived, and how it ended. For each step they show the work, the collectives with their bytes, and the
number of tokens that each expert parallel rank received in each layer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.engine.batch import StepBucket
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.scheduler import StepPlan
from jaxmoe.errors import RequestError
from jaxmoe.files import write_whole
from jaxmoe.jsontext import json_text
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.parallel.mesh import describe

_MAX_KEPT = 50_000  # steps, and requests; the oldest are dropped and counted in the files


@dataclass(kw_only=True)
class RequestRecord:
    """Record the life of one sample of one request. Times are seconds of the engine's clock."""

    name: str
    num_prompt: int
    max_new: int
    queued: float
    chunks: list[dict[str, int]] = field(default_factory=list)  # step, first token, count
    num_tokens: int = 0
    first_token_step: int = -1
    last_token_step: int = -1
    cached: int = 0
    ended: float | None = None
    finish_reason: str | None = None

    def add_token(self, step: int) -> None:
        """Record a new token from this step."""
        if not self.num_tokens:
            self.first_token_step = step
        self.num_tokens, self.last_token_step = self.num_tokens + 1, step


@dataclass(kw_only=True)
class StepRecord:
    """Record one step. expert_tokens [layers, expert ranks]: tokens per expert rank, summed over the data ranks."""

    index: int
    sent: float
    bucket: StepBucket
    decode_steps: int
    num_decodes: int
    num_prompt_tokens: int
    collectives: list[dict[str, Any]]
    waiting: int
    pages_in_use: int
    done: float | None = None
    failed: bool = False
    expert_tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))


class EngineTrace:
    """Collect records while requests run. Not thread-safe."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """facts: properties of the model and the mesh that the trace shows."""
        self.facts = dict(facts)
        self.steps: deque[StepRecord] = deque(maxlen=_MAX_KEPT)
        self.requests: deque[RequestRecord] = deque(maxlen=_MAX_KEPT)
        self.num_steps = self.num_requests = 0
        self._collectives: dict[tuple[StepBucket, int], list[dict[str, Any]]] = {}

    def queued(self, name: str, *, num_prompt: int, max_new: int, now: float) -> RequestRecord:
        """Record a queued request, or one sample of it, and return its record."""
        record = RequestRecord(name=name, num_prompt=num_prompt, max_new=max_new, queued=now)
        self.requests.append(record)
        self.num_requests += 1
        return record

    def sent(
        self,
        plan: StepPlan,
        bucket: StepBucket,
        records: Mapping[int, RequestRecord],
        collectives: Mapping[CollectiveOp, int],
        *,
        waiting: int,
        pages_in_use: int,
        now: float,
    ) -> StepRecord:
        """Record a step that is dispatched to the devices. records: the records of its requests, by id."""
        step = StepRecord(
            index=self.num_steps,
            sent=now,
            bucket=bucket,
            decode_steps=plan.decode_steps,
            num_decodes=len(plan.decodes),
            num_prompt_tokens=sum(chunk.count for chunk in plan.chunks),
            waiting=waiting,
            pages_in_use=pages_in_use,
            collectives=self._listed(bucket, plan.decode_steps, collectives),
        )
        for chunk in plan.chunks:
            record = records.get(chunk.sequence.request_id)
            if record is None:  # the request was queued before the trace began
                continue
            record.cached = max(record.cached, chunk.sequence.num_cached_tokens)
            record.chunks.append({"step": step.index, "start": chunk.start, "count": chunk.count})
        self.steps.append(step)
        self.num_steps += 1
        return step

    def _listed(
        self, bucket: StepBucket, decode_steps: int, collectives: Mapping[CollectiveOp, int]
    ) -> list[dict[str, Any]]:
        """Return the collectives as plain values. Steps of the same bucket and decode steps share one list."""
        key = bucket, decode_steps
        if key not in self._collectives:
            self._collectives[key] = [
                {"op": c.op, "axes": list(c.axes), "count": count, "bytes": c.result_bytes}
                for c, count in collectives.items()
            ]
        return self._collectives[key]

    def done(self, step: StepRecord, rank_loads: np.ndarray, *, now: float) -> None:
        """Record that a step is done. rank_loads [layers, expert ranks]: tokens routed to each rank's experts."""
        step.done = now
        if rank_loads.size:
            step.expert_tokens = rank_loads.astype(np.int32)

    @staticmethod
    def ended(record: RequestRecord, reason: str, *, now: float) -> None:
        """Record the end of a request and its reason."""
        record.ended, record.finish_reason = now, reason

    # --- writing ---

    def as_chrome(self) -> dict[str, Any]:
        """Return the trace in Chrome's format: a track of steps with counters, and one track per request."""
        zero, by_index = self._step_spans()
        micro = lambda time: round((time - zero) * 1e6, 1)  # noqa: E731
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
            for pid, name in ((1, "engine"), (2, "requests"))
        ]
        for step in self.steps:
            if step.done is None:
                continue
            start, end = by_index[step.index]
            traffic = sum(c["count"] * c["bytes"] for c in step.collectives)
            kind = "prompts and decode" if step.bucket.blocks else "decode"
            events.append({
                "ph": "X", "pid": 1, "tid": 1, "name": kind, "ts": micro(start), "dur": round((end - start) * 1e6, 1),
                "args": {
                    "step": step.index, "decodes": step.num_decodes, "decode_steps": step.decode_steps,
                    "prompt_tokens": step.num_prompt_tokens, "seq_slots": step.bucket.seq_slots,
                    "blocks": step.bucket.blocks,
                    "collectives": step.collectives, "collective_bytes_per_device": traffic,
                    "tokens_per_expert_rank_by_layer": step.expert_tokens.tolist(), "failed": step.failed,
                },
            })  # fmt: skip
            values = {"waiting": step.waiting, "pages_in_use": step.pages_in_use, "decoding": step.num_decodes}
            for name, value in values.items():
                events.append({"ph": "C", "pid": 1, "name": name, "ts": micro(start), "args": {name: value}})
        for number, request in enumerate(self.requests, 1):
            events.append({
                "ph": "M", "pid": 2, "tid": number, "name": "thread_name", "args": {"name": request.name},
            })  # fmt: skip
            for name, start, end, details in self._spans(request, by_index):
                events.append({
                    "ph": "X", "pid": 2, "tid": number, "name": name, "ts": micro(start),
                    "dur": round((end - start) * 1e6, 1), "args": details,
                })  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self.facts | self._dropped()}

    def _step_spans(self) -> tuple[float, dict[int, tuple[float, float]]]:
        """Return the start of the trace, and the start and end of each step. Steps do not overlap."""
        zero = min([r.queued for r in self.requests] + [s.sent for s in self.steps], default=0.0)
        busy_until, spans = zero, {}
        for step in self.steps:
            start = max(step.sent, busy_until)
            busy_until = start if step.done is None else step.done
            spans[step.index] = (start, busy_until)
        return zero, spans

    def _dropped(self) -> dict[str, int]:
        return {
            "dropped_steps": self.num_steps - len(self.steps),
            "dropped_requests": self.num_requests - len(self.requests),
        }

    @staticmethod
    def _spans(
        request: RequestRecord, steps: Mapping[int, tuple[float, float]]
    ) -> list[tuple[str, float, float, dict[str, Any]]]:
        """Return the spans (name, start, end, details) of one request, in order."""
        spans: list[tuple[str, float, float, dict[str, Any]]] = []
        begun = [steps[chunk["step"]][0] for chunk in request.chunks if chunk["step"] in steps]
        first = min(begun, default=request.queued if request.ended is None else request.ended)
        spans.append(("queued", request.queued, max(first, request.queued), {"prompt_tokens": request.num_prompt}))
        for chunk in request.chunks:
            if chunk["step"] in steps:
                name = f"prompt {chunk['start']} to {chunk['start'] + chunk['count']}"
                spans.append((name, *steps[chunk["step"]], chunk | {"cached_tokens": request.cached}))
        if request.first_token_step in steps and request.last_token_step in steps:
            start, end = steps[request.first_token_step][1], steps[request.last_token_step][1]
            details = {"new_tokens": request.num_tokens, "finish_reason": request.finish_reason}
            spans.append(("decode", start, max(start, end), details))
        if request.ended is not None:
            spans.append((f"ended: {request.finish_reason}", request.ended, request.ended, {}))
        return spans

    def as_page(self) -> str:
        """Return the timeline as one self-contained HTML page."""
        zero, spans_of = self._step_spans()
        steps = []
        for step in self.steps:
            start, end = spans_of[step.index]
            steps.append({
                "index": step.index, "start": start - zero, "end": end - zero, "decodes": step.num_decodes,
                "decode_steps": step.decode_steps, "prompt": step.num_prompt_tokens, "waiting": step.waiting,
                "pages": step.pages_in_use, "collectives": step.collectives, "experts": step.expert_tokens.tolist(),
                "failed": step.failed,
            })  # fmt: skip
        requests = [
            {
                "name": request.name,
                "spans": [[name, a - zero, b - zero, info] for name, a, b, info in self._spans(request, spans_of)],
            }
            for request in self.requests
        ]
        data = {"facts": self.facts | self._dropped(), "steps": steps, "requests": requests}
        text = json_text(data).replace("<", "\\u003c")  # a request's name must not close the script element
        template = resources.files("jaxmoe.engine").joinpath("timeline.html").read_text(encoding="utf-8")
        return template.replace("/*DATA*/null", text)

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write the trace to path (Chrome's format) and the HTML page next to it; return both paths.

        Each file is written atomically. Raises: RequestError naming the path if it cannot be written.
        """
        target = check_trace_path(path)
        page = target.with_suffix(".html")
        try:
            write_whole(target, json_text(self.as_chrome()))
            write_whole(page, self.as_page())
        except OSError as error:
            raise RequestError(f"trace {target} cannot be written: {error.strerror or error}") from error
        return target, page


def trace_facts(runner: ModelRunner) -> dict[str, Any]:
    """Return the facts about the model and the mesh that a trace records."""
    config = runner.config
    facts = {"family": config.family, "layers": config.num_hidden_layers, "dtype": runner.dtype}
    if config.moe is not None:
        facts |= {"experts": config.moe.num_experts, "experts_per_token": config.moe.num_experts_per_tok}
    return facts | {"mesh": describe(runner.placement.mesh), "kv_bytes_per_token": runner.bytes_per_token}


def check_trace_path(path: str | Path) -> Path:
    """Return the path of a trace.

    Raises: RequestError for a directory, a path with suffix .html, or a parent directory that is not writable.
    """
    target = Path(path)
    if target.is_dir() or target.suffix == ".html":
        raise RequestError(
            f"trace {target} must name a file such as trace.json; the HTML page is written next to it as .html"
        )
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise RequestError(f"trace {target} cannot be written: {target.parent} is not a writable directory")
    return target

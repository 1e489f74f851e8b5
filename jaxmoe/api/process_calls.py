"""Calls of the API in several processes: process 0 runs them and sends their results, the others return these.

So one script runs in every process, whether all of them make a call or process 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import wraps
from typing import Any, NamedTuple

import numpy as np

from jaxmoe import errors
from jaxmoe.api.outputs import CompletionOutput, RequestOutput, TokenEvent
from jaxmoe.engine.cluster import ClusterController, ClusterFollower, cluster_control
from jaxmoe.engine.experts import ExpertLoads
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.worker import ModelExecutor


class FollowedModel(NamedTuple):
    """Identify a model in a process that follows process 0."""

    follower: ClusterFollower
    model_id: int


class ResultCodec(NamedTuple):
    """Turn the result of a call into a JSON value and arrays, and back."""

    encode: Callable[[Any], tuple[Any, list[np.ndarray]]]
    decode: Callable[[Any, list[np.ndarray]], Any]


def _encode_outputs(outputs: list[RequestOutput]) -> tuple[Any, list[np.ndarray]]:
    plain = [asdict(output) for output in outputs]
    for output in plain:
        for completion in output["outputs"]:
            completion["top_logprobs"] = [list(top.items()) for top in completion["top_logprobs"]]
    return plain, []


def _decode_outputs(plain: Any, _: list[np.ndarray]) -> list[RequestOutput]:
    return [
        RequestOutput(**output | {"outputs": [_decode_completion(one) for one in output["outputs"]]})
        for output in plain
    ]


def _decode_completion(plain: dict[str, Any]) -> CompletionOutput:
    return CompletionOutput(**plain | {"top_logprobs": [_pairs_to_dict(top) for top in plain["top_logprobs"]]})


def _pairs_to_dict(pairs: list[tuple[int, float]]) -> dict[int, float]:
    return {int(token): float(logprob) for token, logprob in pairs}


def _encode_events(events: list[TokenEvent]) -> tuple[Any, list[np.ndarray]]:
    return [asdict(event) | {"top_logprobs": list(event.top_logprobs.items())} for event in events], []


def _decode_events(plain: Any, _: list[np.ndarray]) -> list[TokenEvent]:
    return [TokenEvent(**one | {"top_logprobs": _pairs_to_dict(one["top_logprobs"])}) for one in plain]


class ResultCodecs:
    """List the codecs of the results of calls."""

    OUTPUTS = ResultCodec(_encode_outputs, _decode_outputs)
    EVENTS = ResultCodec(_encode_events, _decode_events)
    ARRAYS = ResultCodec(lambda arrays: (None, list(arrays)), lambda _, arrays: arrays)
    ARRAY = ResultCodec(lambda array: (None, [array]), lambda _, arrays: arrays[0])
    LOADS = ResultCodec(lambda loads: (None, list(loads)), lambda _, arrays: ExpertLoads(*arrays))
    NOTHING = ResultCodec(lambda _: (None, []), lambda _, __: None)


def model_control(runner: ModelRunner) -> tuple[ModelExecutor, FollowedModel | None]:
    """Return the executor of a model, and the model of process 0 to follow, if any. Call it in all processes."""
    if not runner.placement.spans_processes:
        return ModelExecutor(runner), None
    control = cluster_control()
    if isinstance(control, ClusterController):
        return control.executor(runner), None
    return ModelExecutor(runner), FollowedModel(control, control.register(runner))


def received(followed: FollowedModel, call: str, codec: ResultCodec) -> Any:
    """Wait for the next call of this name in process 0, and return its result. Raises: the error that it raised."""
    message = followed.follower.result(followed.model_id, call)
    if "error" in message.values:
        raise getattr(errors, message.values["error"])(message.values["text"])
    return codec.decode(message.values["result"], message.arrays)


def send_result(executor: ModelExecutor, call: str, codec: ResultCodec, value: Any) -> None:
    """Send the result of a call to the other processes, if there are any."""
    if executor.has_followers:
        plain, arrays = codec.encode(value)
        executor.send_result(call, {"result": plain}, arrays)


def send_error(executor: ModelExecutor, call: str, error: errors.JaxmoeError) -> None:
    """Send the error that a call raised to the other processes, if there are any."""
    executor.send_result(call, {"error": type(error).__name__, "text": str(error)})


def in_every_process(codec: ResultCodec) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator of LLM methods, which run in process 0 and return its result in all processes."""

    def decorate(method: Callable[..., Any]) -> Any:
        @wraps(method)
        def call(llm: Any, *args: Any, **kwargs: Any) -> Any:
            if llm._followed is not None:
                return received(llm._followed, method.__name__, codec)
            executor: ModelExecutor = llm._shared.executor
            try:
                value = method(llm, *args, **kwargs)
            except errors.JaxmoeError as error:
                send_error(executor, method.__name__, error)
                raise
            send_result(executor, method.__name__, codec, value)
            return value

        return call

    return decorate


def stream_in_every_process(method: Callable[..., Iterator[TokenEvent]]) -> Any:
    """Decorate a method of LLM that yields events: in the other processes they come once the stream has ended."""

    @wraps(method)
    def call(llm: Any, *args: Any, **kwargs: Any) -> Iterator[TokenEvent]:
        if llm._followed is not None:
            return iter(received(llm._followed, method.__name__, ResultCodecs.EVENTS))
        executor: ModelExecutor = llm._shared.executor
        try:
            events = method(llm, *args, **kwargs)
        except errors.JaxmoeError as error:
            send_error(executor, method.__name__, error)
            raise
        return _with_result_sent(executor, method.__name__, events) if executor.has_followers else events

    return call


def _with_result_sent(executor: ModelExecutor, call: str, events: Iterator[TokenEvent]) -> Iterator[TokenEvent]:
    seen: list[TokenEvent] = []
    try:
        for event in events:
            seen.append(event)
            yield event
    except errors.JaxmoeError as error:
        send_error(executor, call, error)
        raise
    send_result(executor, call, ResultCodecs.EVENTS, seen)

"""Turn the token ids of the engine core into text: token events, stop strings, finished outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from jaxmoe.api.outputs import CompletionOutput, RequestOutput, TokenEvent
from jaxmoe.engine.core import EngineCore, EngineRequest
from jaxmoe.engine.request import RequestFinished, SampledToken
from jaxmoe.errors import StepError
from jaxmoe.text.tokenizer import CheckpointTokenizer, TextStream


@dataclass(kw_only=True, eq=False)
class RequestState:
    """Hold the output of one sample of a request: its tokens and text so far, and its pending events."""

    request: EngineRequest
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    events: deque[TokenEvent | RequestFinished] = field(default_factory=deque)  # not consumed yet

    def push(self, token: SampledToken) -> TokenEvent:
        """Append a token and return its event. A stop string ends the sample, unless the token does so by itself."""
        self.token_ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        self.top_logprobs.append(token.top_logprobs)
        reason = token.finish_reason
        if reason == "stop":
            text = self.stream.finish()
        else:
            text = self.stream.push(token.token_id)
            if self.stream.stopped:
                reason = "stop"
            elif reason == "length":
                text += self.stream.finish()
        return TokenEvent(
            index=token.index, sample=token.sample, token_id=token.token_id, logprob=token.logprob,
            top_logprobs=token.top_logprobs, text=text, finish_reason=reason, seed=token.seed,
        )  # fmt: skip

    def output(self) -> CompletionOutput:
        """Return the output of this finished sample."""
        assert self.finish_reason is not None
        return CompletionOutput(
            token_ids=self.token_ids, logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.request.params.top_logprobs else [],
            text=self.stream.text, finish_reason=self.finish_reason, seed=self.request.seed,
        )  # fmt: skip


def request_output(states: Sequence[RequestState]) -> RequestOutput:
    """Return the output of a finished request. states: one for each of its samples."""
    first = states[0].request
    return RequestOutput(
        index=first.index,
        prompt_token_ids=first.sequence.tokens[: first.num_prompt],
        outputs=[state.output() for state in states],
    )


class OutputProcessor:
    """Process the events of an engine core between its steps, for all requests. Not thread-safe.

    A request is forgotten once it has ended, or nobody holds its RequestState.
    """

    def __init__(self, tokenizer: CheckpointTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: WeakValueDictionary[EngineRequest, RequestState] = WeakValueDictionary()

    def add(self, request: EngineRequest) -> RequestState:
        """Return the state of a request that was submitted to a core, and process its events from now on."""
        params, prompt = request.params, request.sequence.tokens[: request.num_prompt]
        stream = TextStream(self._tokenizer, params.stop, prompt=prompt, min_tokens=params.min_tokens)
        state = self._states[request] = RequestState(request=request, stream=stream)
        return state

    def process(self, core: EngineCore) -> None:
        """Take all events of a core. A request whose text has reached a stop string ends in the core.

        A step samples up to decode_steps tokens of a request. Those after a stop string are dropped.
        """
        while core.events:
            request, event = core.events.popleft()
            state = self._states.get(request)
            if state is None:
                continue
            shown = event if isinstance(event, RequestFinished) else self._with_text(state, event)
            if shown.finish_reason is not None:
                del self._states[request]
                if shown.finish_reason != event.finish_reason:
                    core.finish(request, shown.finish_reason, num_tokens=len(state.token_ids))
            state.finish_reason = shown.finish_reason
            state.events.append(shown)

    @staticmethod
    def _with_text(state: RequestState, token: SampledToken) -> TokenEvent | RequestFinished:
        """Return the event of a token. An error of the tokenizer ends its request alone."""
        try:
            return state.push(token)
        except Exception as error:
            fault = StepError(f"the text of this request failed: {error}")
            fault.__cause__ = error
            return RequestFinished(index=token.index, sample=token.sample, finish_reason="error", error=fault)

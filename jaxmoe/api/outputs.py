"""Request outputs and token events of the public API. Does not import JAX."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """Hold one generated sample of a request.

    Attributes:
        token_ids: Generated token ids.
        logprobs: Natural log-probability of each generated token under the model, before penalties and filters.
        top_logprobs: For each generated token, the log-probabilities of the most likely tokens by token id, likeliest
            first. Empty if SamplingParams.top_logprobs is 0.
        text: Generated text; empty if the model has no tokenizer.
        finish_reason: "stop" (end token, stop token or stop string) or "length" (max_tokens or end of the context).
        seed: Seed of this sample. SamplingParams(seed=...) with it samples the same tokens after the same prompt.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    text: str
    finish_reason: str
    seed: int = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """Hold one finished request with its n samples.

    The properties token_ids, logprobs, text, finish_reason and seed return values of the first sample.

    Attributes:
        index: Index of the prompt in the call.
        prompt_token_ids: Token ids of the prompt.
        outputs: The n samples.
    """

    index: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def token_ids(self) -> list[int]:
        """Return the generated token ids of the first sample."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        """Return the log-probabilities of the generated tokens of the first sample."""
        return self.outputs[0].logprobs

    @property
    def text(self) -> str:
        """Return the generated text of the first sample."""
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        """Return the finish reason of the first sample."""
        return self.outputs[0].finish_reason

    @property
    def seed(self) -> int:
        """Return the seed of the first sample. With the same n, it reproduces all samples."""
        return self.outputs[0].seed


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Describe one new token of one sample, as it is streamed.

    Attributes:
        index: Index of the prompt in the call of LLM.stream; 0 in AsyncEngine.stream.
        sample: Index of the sample, in [0, n).
        token_id: The token id.
        logprob: Natural log-probability of the token under the model, before penalties and filters.
        top_logprobs: Log-probabilities of the most likely tokens by token id, likeliest first.
        text: Text that became final with this token. It may be empty.
        finish_reason: As in CompletionOutput with the last token of the sample, otherwise None.
        seed: Seed of this sample.
    """

    index: int
    sample: int
    token_id: int
    logprob: float
    top_logprobs: dict[int, float]
    text: str
    finish_reason: str | None
    seed: int = field(compare=False)

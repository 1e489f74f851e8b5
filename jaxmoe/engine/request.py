"""What a user asks for and what comes back. No JAX here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from jaxmoe.errors import RequestError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature 0 is greedy. top_k 0 (all), top_p 1 and min_p 0 are off. seed: same seed and prompt, same tokens,
    whatever else runs beside. stop: strings that end the text (not part of it). ignore_eos goes on past the end token.
    Raises: RequestError naming the value and its limits.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = field(default=())
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            _require(type(value) is int, f"{name}={value!r} must be a whole number")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
            _require(number, f"{name}={value!r} must be a finite number")
        _require(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1")
        _require(0 <= self.temperature <= 100, f"temperature={self.temperature} must lie in [0, 100]; 0 is greedy")
        _require(0 <= self.top_k < 2**31, f"top_k={self.top_k} must lie in [0, 2^31); 0 keeps all tokens")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]; 0 keeps all tokens")
        _require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2^32)")
        strings = isinstance(self.stop, Sequence) and all(isinstance(s, str) and s for s in self.stop)
        _require(strings, f"stop={self.stop!r} must be non-empty strings")


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One finished request. logprobs: natural log-probability of each new token under the model.

    text is "" where the model has no tokenizer. finish_reason: "stop" (end token or stop string) or "length".
    """

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One new token of one request, as it comes.

    text is what it adds that is final; finish_reason is None until the last.
    """

    index: int
    token_id: int
    logprob: float
    text: str
    finish_reason: str | None


def check_prompt(ids: Sequence[int], *, index: int, vocab_size: int, context: int) -> list[int]:
    """The token ids as a list. Raises: RequestError if it is empty, too long for the context, or out of range."""
    _require(
        isinstance(ids, Iterable) and not isinstance(ids, str | bytes | Mapping),
        f"prompt {index} is {str(ids)[:40]!r}, token ids must be a list of whole numbers",
    )
    ids = list(ids)
    _require(len(ids) > 0, f"prompt {index} is empty: give at least one token")
    _require(
        len(ids) <= context, f"prompt {index} has {len(ids)} tokens, the model's context holds {context}: shorten it"
    )
    for at, token in enumerate(ids):
        whole = isinstance(token, Integral) and not isinstance(token, bool)
        _require(
            whole and 0 <= token < vocab_size,
            f"prompt {index} has token id {token!r} at place {at}; ids must be whole numbers in [0, {vocab_size})",
        )
    return [int(token) for token in ids]

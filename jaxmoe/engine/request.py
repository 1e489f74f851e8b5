"""Sampling parameters, and the events of requests as the engine core emits them. Does not import JAX."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral

from jaxmoe.checks import is_finite, is_unicode, require
from jaxmoe.errors import RequestError, StepError

_require = partial(require, RequestError)
MAX_BIAS_TOKEN_IDS = 384  # of one request: entries of logit_bias, stop_token_ids and the end tokens of the model
MAX_TOP_LOGPROBS = 20
_MAX_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Set how tokens are sampled and when generation stops.

    The repetition penalty is that of CTRL (Keskar et al., 2019); the other penalties are those of OpenAI's API.

    Args:
        max_tokens: Maximum number of generated tokens, in [1, 2^31). None generates up to the end of the context.
        min_tokens: Minimum number of generated tokens, in [0, max_tokens]. Until then end tokens and stop tokens are
            not sampled, and stop strings do not end the text.
        n: Number of samples of each prompt, in [1, 128].
        temperature: Sampling temperature: 0 (greedy), or a number in [0.000001, 100].
        top_k: Sample only from the top_k most likely tokens. 0 and -1 keep all tokens.
        top_p: Sample only from the most likely tokens that together reach this probability, in (0, 1]. 1 keeps all
            tokens.
        min_p: Drop tokens below this fraction of the top probability, in [0, 1]. 0 keeps all tokens.
        repetition_penalty: Divisor of positive logits, and multiplier of negative logits, of tokens that occur in the
            prompt or the output; in [0.01, 100]. 1 is off.
        presence_penalty: Number subtracted from the logits of tokens that occur in the output, in [-100, 100]. 0 is
            off.
        frequency_penalty: Number subtracted from the logits of a token for each of its occurrences in the output, in
            [-100, 100]. 0 is off.
        logit_bias: Mapping from token id to a number in [-1000, 1000] that is added to the logit of the token.
        seed: Random seed in [-2^63, 2^64). Sample i of n uses seed + i. The same seed and prompt give the same tokens,
            independent of other requests. None draws a new seed for each request, reported in CompletionOutput.seed.
        stop: Strings that end the text. The text does not include them. A string that is exactly a special token of the
            tokenizer matches the id of this token.
        stop_token_ids: Token ids that end the output.
        ignore_eos: Whether to continue past the end tokens of the model.
        top_logprobs: Number of most likely tokens to report at each position, in [0, 20].

    Raises:
        RequestError: If a value is out of range. The message gives the value and its limits.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = field(default=())
    stop_token_ids: Sequence[int] = field(default=())
    ignore_eos: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):  # copy, so that the caller cannot change them while the request runs
            if isinstance(getattr(self, name), Sequence) and not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("max_tokens", "min_tokens", "n", "top_k", "seed", "top_logprobs"):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed"):
                continue
            _require(type(value) is int, f"{name}={value!r} must be a whole number")
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(is_finite(value), f"{name}={value!r:.60} must be a finite number")
        most = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        _require(1 <= most < 2**31, f"max_tokens={most} must be at least 1, and below 2^31")
        limit = "2^31)" if self.max_tokens is None else f"max_tokens={self.max_tokens}]"
        _require(0 <= self.min_tokens <= most, f"min_tokens={self.min_tokens} must lie in [0, {limit}")
        _require(1 <= self.n <= _MAX_SAMPLES, f"n={self.n} must lie in [1, {_MAX_SAMPLES}]")
        _require(
            self.temperature == 0 or 1e-6 <= self.temperature <= 100,
            f"temperature={self.temperature} must be 0 (greedy) or lie in [0.000001, 100]",
        )
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _require(0 <= self.top_k < 2**31, f"top_k={self.top_k} must lie in [0, 2^31); 0 and -1 keep all tokens")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]; 0 keeps all tokens")
        _require(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty={self.repetition_penalty} must lie in [0.01, 100]; 1 is off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-100 <= value <= 100, f"{name}={value} must lie in [-100, 100]; 0 is off")
        _require(
            self.seed is None or -(2**63) <= self.seed < 2**64,
            f"seed={self.seed} must lie in [-2^63, 2^64); None draws a random seed",
        )
        _require(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"top_logprobs={self.top_logprobs} must lie in [0, {MAX_TOP_LOGPROBS}]",
        )
        self._check_stop()
        self._check_logit_bias()

    def _check_stop(self) -> None:
        strings = isinstance(self.stop, Sequence) and all(isinstance(s, str) and s for s in self.stop)
        _require(strings, f"stop={self.stop!r} must be non-empty strings")
        for text in self.stop:
            _require(
                is_unicode(text),
                f"stop has {text[:40]!r}, which is not valid Unicode: remove its lone surrogates",
            )
        ids = isinstance(self.stop_token_ids, Sequence) and all(_is_id(token) for token in self.stop_token_ids)
        _require(ids, f"stop_token_ids={self.stop_token_ids!r} must be token ids")

    def _check_logit_bias(self) -> None:
        _require(
            isinstance(self.logit_bias, Mapping), f"logit_bias={self.logit_bias!r:.60} must map token ids to numbers"
        )
        for token, bias in self.logit_bias.items():
            _require(_is_id(token), f"logit_bias has {token!r}; its keys must be token ids")
            within = is_finite(bias) and -1000 <= bias <= 1000
            _require(within, f"logit_bias[{token}]={bias!r:.60} must lie in [-1000, 1000]")
        object.__setattr__(self, "logit_bias", {token: float(bias) for token, bias in self.logit_bias.items()})

    @property
    def adjusts_logits(self) -> bool:
        """Return whether penalties, logit_bias or min_tokens change the logits."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
            or self.min_tokens
        )  # fmt: skip

    @property
    def reads_history(self) -> bool:
        """Return whether a penalty reads all previous tokens."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def check_token_ids(self, *, vocab_size: int, num_eos: int) -> None:
        """Check logit_bias and stop_token_ids against a model.

        Args:
            vocab_size: Number of tokens of the vocabulary.
            num_eos: Number of end tokens of the model, including stop strings that are special tokens.

        Raises:
            RequestError: If a token id is outside the vocabulary, or logit_bias, stop_token_ids and the end tokens have
                more than 384 entries in total.
        """
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                _require(token < vocab_size, f"{name} has token id {token}; ids must lie in [0, {vocab_size})")
        num_token_ids = len(self.logit_bias) + len(self.stop_token_ids) + num_eos
        _require(
            num_token_ids <= MAX_BIAS_TOKEN_IDS,
            f"logit_bias and stop_token_ids have {num_token_ids - num_eos} entries, a request of this model may have "
            f"at most {MAX_BIAS_TOKEN_IDS - num_eos}: remove some",
        )


def drawn_seed() -> int:
    """Draw a random seed below 2^53, which every JSON reader represents exactly."""
    return secrets.randbits(53)


def seed_of_sample(seed: int, sample: int) -> int:
    """Return the seed of one sample of a request: seed + sample, wrapped around at 2^64."""
    return seed + sample if seed + sample < 2**64 else seed + sample - 2**64


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """Describe one sampled token of one sample, as the engine core emits it.

    Attributes:
        index: Index of the prompt in its call.
        sample: Index of the sample, in [0, n).
        token_id: The token id.
        logprob: Natural log-probability of the token under the model, before penalties and filters.
        top_logprobs: Log-probabilities of the most likely tokens by token id, likeliest first.
        finish_reason: "stop" for an end token, "length" for the last token that fits; otherwise None.
        seed: Seed of this sample.
    """

    index: int
    sample: int
    token_id: int
    logprob: float
    top_logprobs: dict[int, float]
    finish_reason: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class RequestFinished:
    """Report the end of a request without a further token.

    finish_reason: "cancelled", "deadline" or "error". error: the StepError, if finish_reason is "error".
    """

    index: int
    sample: int
    finish_reason: str
    error: StepError | None = None


def check_prompt(ids: Sequence[int], *, index: int, vocab_size: int, context: int) -> list[int]:
    """Return the token ids as a list. Raises: RequestError if they are empty, out of range or exceed the context."""
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
            f"prompt {index} has token id {token!r} at position {at}; ids must be whole numbers in [0, {vocab_size})",
        )
    return [int(token) for token in ids]

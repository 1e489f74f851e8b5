"""What a user asks for and what comes back. No JAX here."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from jaxmoe.errors import RequestError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


MAX_BIAS_TOKEN_IDS = 384  # entries of logit_bias, stop_token_ids and the model's end tokens of one request together
MAX_TOP_LOGPROBS = 20
_MAX_SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_tokens: of the answer; None goes on to the end of the context. temperature 0 is greedy. top_k 0 or -1 (all),
    top_p 1 and min_p 0 are off. repetition_penalty divides (multiplies, below
    zero) the logits of tokens seen in prompt or answer; presence_penalty is taken from those seen in the answer,
    frequency_penalty as often as they were. logit_bias: added to the logits of these token ids. seed: same seed and
    prompt, same tokens, whatever else runs beside; of 64 bits, signed or not; sample i of n draws by seed + i. None
    draws a seed for every request, which its CompletionOutput names.
    stop: strings that end the text (not part of it); the text of a special token stands for its id. stop_token_ids:
    tokens that end it. ignore_eos goes on past the end token. min_tokens: neither an end token nor a stop token comes
    before so many, and no stop string ends the text within them. top_logprobs: how many of the likeliest tokens are
    reported at each place.
    Raises: RequestError naming the value and its limits.

    Source: repetition penalty as in CTRL (Keskar et al., 2019); the others as in OpenAI's API.
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
        for name in ("stop", "stop_token_ids"):  # copies, which nobody changes while the request runs
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
            f"seed={self.seed} must lie in [-2^63, 2^64); None draws one",
        )
        _require(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"top_logprobs={self.top_logprobs} must lie in [0, {MAX_TOP_LOGPROBS}]",
        )
        strings = isinstance(self.stop, Sequence) and all(isinstance(s, str) and s for s in self.stop)
        _require(strings, f"stop={self.stop!r} must be non-empty strings")
        for text in self.stop:
            _require(
                is_unicode(text),
                f"stop has {text[:40]!r}, which is not valid Unicode: no answer holds a lone surrogate",
            )
        ids = isinstance(self.stop_token_ids, Sequence) and all(_is_id(token) for token in self.stop_token_ids)
        _require(ids, f"stop_token_ids={self.stop_token_ids!r} must be token ids")
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
        """Whether penalties, a bias or a least length change the logits."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
            or self.min_tokens
        )  # fmt: skip

    @property
    def reads_history(self) -> bool:
        """Whether penalties read all tokens before the next one."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def check_token_ids(self, *, vocab_size: int, num_eos: int) -> None:
        """Raises: RequestError if a token id of these is outside the vocabulary, or they are too many with the end
        tokens of the model."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                _require(token < vocab_size, f"{name} has token id {token}; ids must lie in [0, {vocab_size})")
        num_token_ids = len(self.logit_bias) + len(self.stop_token_ids) + num_eos
        _require(
            num_token_ids <= MAX_BIAS_TOKEN_IDS,
            f"logit_bias and stop_token_ids have {num_token_ids - num_eos} entries, a request of this model may have "
            f"{MAX_BIAS_TOKEN_IDS - num_eos} in all",
        )


def drawn_seed() -> int:
    """Draw a seed for a request that names none, below 2^53: every reader of JSON holds it exactly."""
    return secrets.randbits(53)


def seed_of_sample(seed: int, sample: int) -> int:
    """Return the seed of one sample of a request of this seed; past the largest it goes on from 0."""
    return seed + sample if seed + sample < 2**64 else seed + sample - 2**64


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode: JSON escapes can spell lone surrogates, which no encoding takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: object) -> bool:
    """Whether value is a number, and a float can hold it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One answer. logprobs: natural log-probability of each new token under the model, before penalties and filters.

    top_logprobs: for each new token the likeliest tokens and their logprobs, likeliest first; none if not asked for.
    text is "" where the model has no tokenizer. finish_reason: "stop" (end token, stop token or stop string) or
    "length". seed: what it was drawn by; SamplingParams(seed=...) with it draws the same tokens after the same prompt.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    text: str
    finish_reason: str
    seed: int = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """One finished request: its n samples; token_ids, logprobs, text, finish_reason and seed are those of the first."""

    index: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def token_ids(self) -> list[int]:
        """Of the first sample."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        """Of the first sample."""
        return self.outputs[0].logprobs

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        """Of the first sample."""
        return self.outputs[0].finish_reason

    @property
    def seed(self) -> int:
        """Of the first sample; with n as it was it repeats all of them."""
        return self.outputs[0].seed


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One new token of one sample of one request, as it comes.

    text is what it adds that is final; finish_reason is None until the sample's last. top_logprobs, seed: as in
    CompletionOutput.
    """

    index: int
    sample: int
    token_id: int
    logprob: float
    top_logprobs: dict[int, float]
    text: str
    finish_reason: str | None
    seed: int = field(compare=False)


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

"""Inputs and outputs of sampling: the parameters of every row, and its token with log-probabilities."""

# Dims: B rows, V vocabulary, W = ceil(V/32) words of a bitmask, L tokens with a bias, T top tokens.
from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt32

MAX_TOP = 20


class SamplingArrays(NamedTuple):
    """Hold the sampling parameters of every row.

    temperature 0 means greedy sampling. top_k 0, top_p 1, min_p 0, repetition 1, presence 0 and frequency 0 disable
    their feature. seed and seed_high: low and high half of a 64-bit seed. prompt_length: number of prompt tokens.
    bias_token_ids: ids of tokens with a bias, at least V where unused. The first num_stop_ids of them are banned for
    new tokens at positions below min_tokens_until. token_bitmask: the tokens that may be sampled, in the layout of
    xgrammar and llguidance: token t is allowed if bit t % 32 of word t // 32 is set.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]
    seed_high: UInt32[Array, "B"]
    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    prompt_length: Int[Array, "B"]
    bias_token_ids: Int[Array, "B L"]
    bias: Float[Array, "B L"]
    num_stop_ids: Int[Array, "B"]
    min_tokens_until: Int[Array, "B"]
    token_bitmask: Int[Array, "B W"]


class SamplerOutput(NamedTuple):
    """Hold the next token of every row, its log-probability under the model, and the top tokens with theirs.

    logprobs is NaN if the logits of a row are invalid: one is NaN or plus infinity, or all are minus infinity, also if
    the token bitmask makes them so. Ignore the token in that case.
    """

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    top_tokens: Int[Array, "B T"]
    top_logprobs: Float[Array, "B T"]


class SamplingFeatures(NamedTuple):
    """Flag the sampling features that at least one row of a batch uses. The others are skipped.

    random: a row samples at random. adjusted: a row has penalties or biases. top: a row returns top log-probabilities.
    masked: a row has a token bitmask that excludes a token.
    """

    random: Bool[Array, ""]
    adjusted: Bool[Array, ""]
    top: Bool[Array, ""]
    masked: Bool[Array, ""]

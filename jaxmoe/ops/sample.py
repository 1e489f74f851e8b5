"""Sample one token per row from logits.

Penalties and biases are applied first, then the token bitmask. Then the token is chosen greedily, or drawn at random
with temperature, top-k, top-p and min-p from the seed of its row.

- xla: runs on any platform; skips features that no row uses.
- native: a C++ kernel for CPUs (ops/native; needs a compiler); programs with it compile in half the time.
"""

# Dims: B rows, V vocabulary, W = ceil(V/32) words of a bitmask, C token capacity of a row's history, L tokens with a
# bias, T top tokens, M pages of S tokens, P pages of a row.
from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxmoe.ops import native

SamplingBackend = Literal["xla", "native"]
SAMPLING_BACKENDS: tuple[SamplingBackend, ...] = ("xla", "native")
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


def adjust_logits(
    logits: Float[Array, "B V"], rows: SamplingArrays, history: Int[Array, "B C"], positions: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Apply penalties, then biases, then token bans to logits.

    history: earlier tokens of every row, of which the first `positions` are valid.
    """
    num_rows, vocab = logits.shape
    place = jnp.arange(history.shape[1])
    row = jnp.arange(num_rows)[:, None]

    def counted(which: Array) -> Array:
        return jnp.zeros((num_rows, vocab), jnp.int32).at[row, jnp.where(which, history, vocab)].add(1, mode="drop")

    known = place < positions[:, None]
    seen = counted(known) > 0
    answered = counted(known & (place >= rows.prompt_length[:, None]))
    factor = rows.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - rows.presence[:, None] * (answered > 0) - rows.frequency[:, None] * answered
    masked = jnp.arange(rows.bias_token_ids.shape[1]) < rows.num_stop_ids[:, None]
    masked &= positions[:, None] < rows.min_tokens_until[:, None]
    logits = logits.at[row, rows.bias_token_ids].add(rows.bias, mode="drop")
    return logits.at[row, jnp.where(masked, rows.bias_token_ids, vocab)].set(-jnp.inf, mode="drop")


def apply_token_bitmask(
    logits: Float[Array, "B V"], token_bitmask: Int[Array, "B W"]
) -> tuple[Float[Array, "B V"], Bool[Array, "B"]]:
    """Set the logits of tokens that token_bitmask excludes to -inf. Return them, and whether a row lost its last token.

    A row whose logits are all -inf beforehand has no token to lose.
    """
    bits = (token_bitmask[:, :, None] >> jnp.arange(32)) & 1
    allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0
    masked = jnp.where(allowed, logits, -jnp.inf)
    return masked, (jnp.max(logits, axis=-1) > -jnp.inf) & (jnp.max(masked, axis=-1) == -jnp.inf)


def filter_logits(logits: Float[Array, "B V"], rows: SamplingArrays) -> Float[Array, "B V"]:
    """Divide logits by temperature and set tokens that top-k, then top-p, then min-p exclude to -inf.

    The best token always remains. All tokens that tie with the k-th best one remain, too.
    Source: Holtzman et al. (2019) for top-p, Nguyen et al. (2024) for min-p.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)  # subtracted first, so that a small temperature cannot overflow
    scaled = (logits - best) / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    falling = -jnp.sort(-scaled, axis=-1)
    vocab = logits.shape[-1]
    kth = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab) - 1
    smallest = jnp.take_along_axis(falling, kth[:, None], axis=-1)
    within_k = falling >= smallest
    share = jax.nn.softmax(jnp.where(within_k, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    top_p = jnp.where(rows.top_p < 1, rows.top_p, jnp.inf)[:, None]  # 1 disables top-p; float32 sums may reach 1 early
    kept = within_k & (before < top_p) & (share >= rows.min_p[:, None] * share[:, :1])
    kept = kept.at[:, 0].set(True)
    lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= lowest, scaled, -jnp.inf)


def gumbel_noise(
    seed: UInt32[Array, "B"], seed_high: UInt32[Array, "B"], positions: Int[Array, "B"], vocab_size: int
) -> Float[Array, "B {vocab_size}"]:
    """Return Gumbel noise that depends on a row's seed and position only. It is the same on every backend.

    The generator is Threefry-2x32. Its key is (seed, position) for seeds of up to 32 bits, and Threefry of the position
    under the seed for larger ones.
    """

    def row(low: Array, high: Array, position: Array) -> Array:
        first, second = threefry_2x32((low, high), jnp.stack([position, jnp.zeros_like(position)]))
        key = jnp.where(high == 0, low, first), jnp.where(high == 0, position, second)
        bits = threefry_2x32(key, jnp.arange(vocab_size, dtype=jnp.uint32))
        uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0 + 2.0**-24
        return -jnp.log(-jnp.log(uniform))

    return jax.vmap(row)(seed, seed_high, positions.astype(jnp.uint32))


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingArrays,
    token_pages: Int[Array, "M S"],
    block_table: Int[Array, "B P"],
    positions: Int[Array, "B"],
    features: SamplingFeatures,
    *,
    backend: SamplingBackend = "xla",
) -> SamplerOutput:
    """Sample the next token of every row.

    positions: position of the new token. Earlier tokens of the row are read from token_pages through its block table.
    Random draws depend on the row's seed and position only, never on other rows of the batch.
    """
    logits = logits.astype(jnp.float32)
    num_top = min(MAX_TOP, logits.shape[-1])
    if backend == "native":
        flags = jnp.stack(features)
        return SamplerOutput(
            *native.native_sample(logits, token_pages, block_table, positions, flags, rows, num_top=num_top)
        )
    return _xla(logits, rows, token_pages, block_table, positions, features, num_top)


def _xla(logits, rows, token_pages, block_table, positions, features, num_top):
    def adjust() -> Array:
        return adjust_logits(logits, rows, token_pages[block_table].reshape(len(block_table), -1), positions)

    def change() -> tuple[Array, Array]:
        adjusted = jax.lax.cond(features.adjusted, adjust, lambda: logits)
        mask = lambda: apply_token_bitmask(adjusted, rows.token_bitmask)  # noqa: E731
        return jax.lax.cond(features.masked, mask, lambda: (adjusted, none_lost))

    none_lost = jnp.zeros(len(logits), jnp.bool_)
    changes = features.adjusted | features.masked
    adjusted, lost = jax.lax.cond(changes, change, lambda: (logits, none_lost))
    best = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        noise = gumbel_noise(rows.seed, rows.seed_high, positions, logits.shape[-1])
        random_tokens = jnp.argmax(filter_logits(adjusted, rows) + noise, axis=-1)
        return jnp.where(rows.temperature > 0, random_tokens.astype(jnp.int32), best)

    tokens = jax.lax.cond(features.random, draw, lambda: best)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    total = jnp.where(jnp.isfinite(total), total, jnp.nan)
    picked = jnp.where(lost, jnp.nan, (jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0])

    def likeliest() -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(logits, num_top)
        return indices, values - total

    shape = (len(tokens), num_top)
    top = jax.lax.cond(features.top, likeliest, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))
    return SamplerOutput(tokens, picked, *top)

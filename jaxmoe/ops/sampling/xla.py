"""Sampling by XLA, on any platform. Features that no row uses are skipped."""

# Dims: B rows, V vocabulary, W words of a bitmask, C token capacity of a row's history.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.ops.sampling.arrays import SamplerOutput, SamplingArrays
from jaxmoe.ops.sampling.noise import gumbel_noise


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


def sample(logits, rows, token_pages, block_table, positions, features, *, num_top: int) -> SamplerOutput:
    """Compute ops.sampling. num_top: number of top tokens of a row."""

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

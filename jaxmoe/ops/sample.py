"""From logits to one token a row: greedy, or drawn by temperature, top-k, top-p and min-p from the row's own seed."""

# Dims: B rows, V vocabulary.
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class SamplingArrays(NamedTuple):
    """Per-row sampling values. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def filter_logits(logits: Float[Array, "B V"], rows: SamplingArrays) -> Float[Array, "B V"]:
    """logits over temperature, with -inf where top-k, then top-p, then min-p exclude a token; the best always stays.

    Source: Holtzman et al. (2019) for top-p, Nguyen et al. (2024) for min-p; ties at the top-k edge all stay.
    """
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    falling = -jnp.sort(-scaled, axis=-1)
    vocab = logits.shape[-1]
    kth = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab) - 1
    smallest = jnp.take_along_axis(falling, kth[:, None], axis=-1)
    within_k = falling >= smallest
    share = jax.nn.softmax(jnp.where(within_k, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    top_p = jnp.where(rows.top_p < 1, rows.top_p, jnp.inf)[:, None]  # 1 is off, though float32 sums reach it early
    kept = within_k & (before < top_p) & (share >= rows.min_p[:, None] * share[:, :1])
    kept = kept.at[:, 0].set(True)
    lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= lowest, scaled, -jnp.inf)


def sample(
    logits: Float[Array, "B V"], rows: SamplingArrays, positions: Int[Array, "B"], any_drawn: Bool[Array, ""]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The next token of every row and its log-probability under the model (temperature and filters aside).

    Draws depend on the row's seed and position alone, never on its neighbours. any_drawn says whether any row has a
    temperature above 0; without one nothing is sorted.
    """
    logits = logits.astype(jnp.float32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        def noise(seed, position):
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

        drawn = jnp.argmax(filter_logits(logits, rows) + jax.vmap(noise)(rows.seed, positions), axis=-1)
        return jnp.where(rows.temperature > 0, drawn.astype(jnp.int32), best)

    tokens = jax.lax.cond(any_drawn, draw, lambda: best)
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, picked - jax.nn.logsumexp(logits, axis=-1)

"""Reference of sampling: one row at a time, where every token is compared with every other one."""

# Dims: B rows, V vocabulary, C token capacity of the row's history.
from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.ops.sampling.arrays import MAX_TOP, SamplerOutput
from jaxmoe.ops.sampling.noise import gumbel_noise


def sample(logits, rows, token_pages, block_table, positions, features):
    """Define the result of ops.sampling."""
    logits = logits.astype(jnp.float32)
    history = token_pages[block_table].reshape(len(block_table), -1)
    noise = gumbel_noise(rows.seed, rows.seed_high, positions, logits.shape[1])
    adjusted = jnp.where(features.adjusted, jax.vmap(_adjusted)(logits, rows, history, positions), logits)
    token, has_token = jnp.arange(logits.shape[1]), jnp.max(adjusted, axis=1) > -jnp.inf
    is_allowed = (rows.token_bitmask[:, token // 32] >> (token % 32)) & 1 == 1
    adjusted = jnp.where(features.masked & ~is_allowed, -jnp.inf, adjusted)
    lost = has_token & (jnp.max(adjusted, axis=1) == -jnp.inf)
    drawn_tokens = jnp.argmax(jax.vmap(_filtered)(adjusted, rows) + noise, axis=1)
    is_random = features.random & (rows.temperature > 0)
    tokens = jnp.where(is_random, drawn_tokens, jnp.argmax(adjusted, axis=1)).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(logits, axis=1)  # of the model, before any change
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(MAX_TOP, logits.shape[1]))
    return SamplerOutput(
        tokens,
        jnp.where(lost, jnp.nan, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]),
        jnp.where(features.top, top_tokens, 0),
        jnp.where(features.top, top_logprobs, 0),
    )


def _adjusted(logits, row, history, position):
    """Apply penalties, biases and bans to the logits [V] of one row with history [C]."""
    vocab, place = jnp.arange(len(logits)), jnp.arange(len(history))
    is_token = (history[:, None] == vocab) & (place < position)[:, None]
    is_answer = is_token & (place >= row.prompt_length)[:, None]
    penalized = jnp.where(logits > 0, logits / row.repetition, logits * row.repetition)
    logits = jnp.where(jnp.any(is_token, axis=0), penalized, logits)
    logits -= row.presence * jnp.any(is_answer, axis=0) + row.frequency * jnp.sum(is_answer, axis=0)
    is_biased = row.bias_token_ids[:, None] == vocab
    logits += jnp.sum(jnp.where(is_biased, row.bias[:, None], 0), axis=0)
    is_stop = (jnp.arange(len(row.bias)) < row.num_stop_ids) & (position < row.min_tokens_until)
    return jnp.where(jnp.any(is_biased & is_stop[:, None], axis=0), -jnp.inf, logits)


def _filtered(logits, row):
    """Divide the logits [V] of one row by its temperature, and exclude tokens by top-k, then top-p, then min-p."""
    scaled = logits / jnp.where(row.temperature > 0, row.temperature, 1)
    is_better = scaled > scaled[:, None]  # [V,V]: whether the second token is better than the first
    within_k = (row.top_k == 0) | (jnp.sum(is_better, axis=1) < row.top_k)
    shares = jax.nn.softmax(jnp.where(within_k, scaled, -jnp.inf))
    within_p = (row.top_p == 1) | (jnp.sum(is_better * shares, axis=1) < row.top_p)
    is_kept = within_k & within_p & (shares >= row.min_p * jnp.max(shares))
    return jnp.where(is_kept | (scaled == jnp.max(scaled)), scaled, -jnp.inf)

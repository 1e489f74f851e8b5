"""Grouped-query attention of a prompt's tokens over those before them (causal)."""

# Dims: B batch, S new tokens, K key/value head slots, G query heads a slot, H head dim, R rows, C keys.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MASKED = -1e30


def visible(query_at: Array, key_at: Array, window: int | None) -> Array:
    """Whether a query at one position may see a key at another: not later, and within the window."""
    distance = query_at - key_at
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _softmax_times(scores: Array, allowed: Array, v: Array) -> Array:
    """Softmax of scores [...,R,C] where allowed, over values [...,C,H]: [...,R,H] in v's dtype; float32 sums."""
    scores = jnp.where(allowed, scores, MASKED)
    shares = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(shares, axis=-1, keepdims=True)
    mixed = jnp.einsum("...rc,...ch->...rh", shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(v.dtype)


def causal_attention(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    window: int | None = None,
    query_block: int = 128,
) -> Float[Array, "B S K G H"]:
    """Each token over itself and those before it (the last `window` of them, where given).

    One prompt at a time, query_block queries at a time, each block over no more keys than it can see: scores stay in a
    core's cache and never hold S x S.
    """
    return jax.lax.map(lambda row: _causal_row(*row, window=window, query_block=query_block), (q, k, v))


def _causal_row(q, k, v, *, window: int | None, query_block: int):
    """One prompt: q [S,K,G,H], k and v [S,K,H] -> [S,K,G,H]."""
    length, slots, group, head_dim = q.shape
    q, k, v = q.transpose(1, 2, 0, 3) * head_dim**-0.5, k.swapaxes(0, 1), v.swapaxes(0, 1)
    blocks = []
    for start in range(0, length, query_block):
        stop = min(start + query_block, length)
        first = 0 if window is None else max(0, start - window + 1)
        allowed = visible(jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None], window)
        rows = q[:, :, start:stop].reshape(slots, group * (stop - start), head_dim)
        scores = jnp.einsum("krh,kch->krc", rows, k[:, first:stop], preferred_element_type=jnp.float32)
        mixed = _softmax_times(scores, jnp.tile(allowed, (group, 1)), v[:, first:stop])
        blocks.append(mixed.reshape(slots, group, stop - start, head_dim))
    return jnp.concatenate(blocks, axis=2).transpose(2, 0, 1, 3)

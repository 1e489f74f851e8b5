"""Causal grouped-query attention within prompts, in blocks of queries."""

# Dims: B batch, S new tokens, K key/value head slots, G query heads of a slot, H head dim of keys, V head dim of
# values, R rows, C keys.
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops.attention.mask import MaskSpec


def _softmax_times(scores: Array, allowed: Array, v: Array, sinks: Array | None) -> Array:
    """Apply the masked softmax of scores [...,R,C] to values [...,C,V]; return [...,R,V] in v's dtype.

    Sinks [...,R,1] enter the softmax's denominator. Sums are float32.
    """
    scores = jnp.where(allowed, scores, -jnp.inf)
    best = jnp.max(scores, axis=-1, keepdims=True)
    best = best if sinks is None else jnp.maximum(best, sinks)
    exp_scores = jnp.exp(scores - best)
    total = jnp.sum(exp_scores, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - best)
    mixed = jnp.einsum("...rc,...ch->...rh", exp_scores.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(v.dtype)


def causal_attention(
    q: Float[Array, "B S K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    sinks: Float[Array, "K G"] | None = None,
    *,
    mask_spec: MaskSpec,
    query_block: int = 128,
) -> Float[Array, "B S K G V"]:
    """Attend from each token to itself and the earlier tokens that the mask allows.

    sinks: logits of attention sinks; they enter the softmax's denominator only. Prompts are computed one at a time, in
    blocks of query_block queries, each over only the keys that the block can see. The scores of a block fit a core's
    cache; an S x S matrix is never stored.
    """
    each = partial(_causal_row, sinks=sinks, mask_spec=mask_spec, query_block=query_block)
    return jax.lax.map(lambda row: each(*row), (q, k, v))


def _causal_row(q, k, v, *, sinks, mask_spec: MaskSpec, query_block: int):
    """Compute attention of one prompt: q [S,K,G,H], k [S,K,H], v [S,K,V] -> [S,K,G,V]."""
    length, slots, group, head_dim = q.shape
    q, k, v = q.transpose(1, 2, 0, 3) * mask_spec.scale, k.swapaxes(0, 1), v.swapaxes(0, 1)
    blocks = []
    for start in range(0, length, query_block):
        stop = min(start + query_block, length)
        first = mask_spec.first_visible(start)
        allowed = mask_spec.mask(jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None])
        rows = q[:, :, start:stop].reshape(slots, group * (stop - start), head_dim)
        scores = jnp.einsum("krh,kch->krc", rows, k[:, first:stop], preferred_element_type=jnp.float32)
        own = None if sinks is None else jnp.repeat(sinks.astype(jnp.float32), stop - start, axis=1)[..., None]
        mixed = _softmax_times(scores, jnp.tile(allowed, (group, 1)), v[:, first:stop], own)
        blocks.append(mixed.reshape(slots, group, stop - start, -1))
    return jnp.concatenate(blocks, axis=2).transpose(2, 0, 1, 3)

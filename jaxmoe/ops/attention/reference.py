"""Reference of attention: the softmax of all scores of all queries and keys, in float32."""

# Dims: B batch, Q queries, C keys, S new tokens, K key/value head slots, G query heads of a slot, H head dim of keys,
# V head dim of values.
from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.mask import MaskSpec


def causal_attention(q, k, v, sinks=None, *, mask_spec: MaskSpec):
    """Define the result of ops.attention."""
    positions = jnp.arange(q.shape[1])[None]
    return masked_attention(q, k, v, positions, positions, sinks, mask_spec=mask_spec)


def masked_attention(q, k, v, query_at, key_at, sinks=None, *, mask_spec: MaskSpec):
    """Attend from queries [B,Q,K,G,H] at positions query_at [B,Q] to keys [B,C,K,H] at positions key_at [B,C].

    Values are [B,C,K,V]. Returns [B,Q,K,G,V] in q's dtype.
    """
    dtype, (q, k, v) = q.dtype, (part.astype(jnp.float32) for part in (q, k, v))
    allowed = mask_spec.mask(query_at[:, :, None], key_at[:, None])[:, None, None]
    scores = jnp.einsum("bqkgh,bckh->bkgqc", q, k, precision="highest") * mask_spec.scale
    scores = jnp.where(allowed, scores, -jnp.inf)
    if sinks is not None:
        own = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bkgqc,bckv->bqkgv", weights, v, precision="highest").astype(dtype)

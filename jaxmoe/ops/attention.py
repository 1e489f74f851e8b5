"""Grouped-query attention of a prompt's tokens over those before them (causal)."""

# Dims: B batch, S new tokens, K key/value head slots, G query heads a slot, H head dim, V that of values, R rows,
# C keys.
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Attention mask, causal, and scale. A query sees of the tokens up to its own the last `window` of them, those of
    its own chunk of so many positions, all where None; and what its scores are multiplied by."""

    scale: float
    window: int | None = None
    chunk: int | None = None

    def mask(self, query_at: Array, key_at: Array) -> Array:
        """Whether a query at one position may see a key at another."""
        distance = query_at - key_at
        allowed = distance >= 0
        if self.window is not None:
            allowed &= distance < self.window
        if self.chunk is not None:
            allowed &= query_at // self.chunk == key_at // self.chunk
        return allowed

    @property
    def is_full_causal(self) -> bool:
        """Whether a query sees all tokens up to its own."""
        return self.window is None and self.chunk is None

    def first_visible(self, query_at: Any) -> Any:
        """The first position that a query at a position (one, or an array of them) sees."""
        first = 0 * query_at if self.window is None else query_at - self.window + 1
        if self.chunk is not None:
            return _larger(first, query_at // self.chunk * self.chunk)
        return _larger(first, 0)


def _larger(one: Any, other: Any) -> Any:
    return max(one, other) if isinstance(one, int) else jnp.maximum(one, other)


def _softmax_times(scores: Array, allowed: Array, v: Array, sinks: Array | None) -> Array:
    """Softmax of scores [...,R,C] where allowed, and of sinks [...,R,1] beside them, over values [...,C,V]: [...,R,V]
    in v's dtype; float32 sums."""
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
    """Each token over itself and those before it that it sees. sinks: logits that take part and add nothing.

    One prompt at a time, query_block queries at a time, each block over no more keys than it can see: scores stay in a
    core's cache and never hold S x S.
    """
    each = partial(_causal_row, sinks=sinks, mask_spec=mask_spec, query_block=query_block)
    return jax.lax.map(lambda row: each(*row), (q, k, v))


def _causal_row(q, k, v, *, sinks, mask_spec: MaskSpec, query_block: int):
    """One prompt: q [S,K,G,H], k [S,K,H], v [S,K,V] -> [S,K,G,V]."""
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

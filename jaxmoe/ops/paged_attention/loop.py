"""Paged attention by a loop over groups of pages with an online softmax, on any platform.

The loop runs as often as the longest row needs.
"""

# Dims: N query blocks, Q tokens of a block, P pages of a row, K key/value head slots, G query heads of a slot, H head
# dim of keys, V head dim of values, T tokens, C context-parallel ranks.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.paged_attention.pages import ContextShard, Pages, split_pages
from jaxmoe.ops.stack import LayerIndex

_GROUP_TOKENS = 128  # keys of one loop iteration


def paged_attention(q, pages, block_table, positions, query_lens, layer, sinks, *, mask_spec, value_dim):
    """Compute ops.paged_attention. Sums are float32."""
    mixed, total, best = _loop(
        q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, ContextShard()
    )
    if sinks is not None:
        shrunk, own = _with_sinks(best, sinks)
        mixed, total = mixed * shrunk, total * shrunk + own
    real = (jnp.arange(q.shape[1]) < query_lens[:, None])[:, :, None, None, None]
    # A valid token gets NaN if its scores are all minus infinity; padded tokens, which see no key, get 0.
    return jnp.where(total > 0, mixed / total, jnp.where(real, jnp.nan, 0.0)).astype(q.dtype)


def _with_sinks(best: Array, sinks: Float[Array, "K G"]) -> tuple[Array, Array]:
    """Return the factor for sums of exp(score - best) [...,K,G,1] once sinks are included, and the sinks' own term."""
    sinks = sinks.astype(jnp.float32)[..., None]
    higher = jnp.maximum(best, sinks)
    return jnp.exp(best - higher), jnp.exp(sinks - higher)


def _finite(best: Array) -> Array:
    """Return the best score, or 0 if no key was seen yet. Exponentials subtract it."""
    return jnp.where(best == -jnp.inf, 0.0, best)


def partial_attention(
    q: Float[Array, "N Q K G H"],
    pages: Pages,
    block_table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    query_lens: Int[Array, "N"],
    layer: LayerIndex = 0,
    *,
    shard: ContextShard,
    mask_spec: MaskSpec,
    value_dim: int | None = None,
) -> Float[Array, "N Q K G V+1"]:
    """Attend to this rank's part of every page, in the same loop. float32.

    Returns the attention output [..., :V] and the log-sum-exp of the scores [..., V], for merge_attention.
    """
    mixed, total, best = _loop(q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, shard)
    some = jnp.maximum(total, 1e-30)
    return jnp.concatenate([mixed / some, jnp.where(total > 0, best + jnp.log(some), -jnp.inf)], axis=-1)


def merge_attention(
    parts: Float[Array, "C T K G V+1"], sinks: Float[Array, "K G"] | None = None
) -> Float[Array, "T K G V"]:
    """Merge the partial_attention results of all ranks into attention over all keys. float32."""
    mixed, weight = parts[..., :-1], parts[..., -1:]
    best = jnp.max(weight, axis=0)
    rank_weight = jnp.exp(weight - _finite(best))
    mixed, total = jnp.sum(mixed * rank_weight, axis=0), jnp.sum(rank_weight, axis=0)
    if sinks is not None:
        shrunk, own = _with_sinks(best, sinks)
        mixed, total = mixed * shrunk, total * shrunk + own
    return mixed / jnp.maximum(total, 1e-30)  # 0 for tokens that see no key


def _loop(q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, shard):
    """Run the online softmax over all pages.

    Returns the weighted sum of values [N,Q,K,G,V], the sum of weights [N,Q,K,G,1] and the best score [N,Q,K,G,1]. Each
    weight is exp(score - best score).
    """
    num_blocks, tokens, slots, group, head_dim = q.shape
    k_pages, v_pages, k_scales, v_scales = split_pages(pages, value_dim)
    value_dim = v_pages.shape[4] if value_dim is None else value_dim
    page_size = k_pages.shape[3]
    group_pages = max(1, min(block_table.shape[1], _GROUP_TOKENS // page_size))
    block_table = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % group_pages)))
    span = group_pages * page_size
    each = jnp.arange(span)
    key_at = each // page_size * (page_size * shard.num_ranks) + shard.rank * page_size + each % page_size
    rows = (q * mask_spec.scale).transpose(0, 2, 3, 1, 4).reshape(num_blocks, slots, group * tokens, head_dim)
    query_at = jnp.tile(positions[:, None] + jnp.arange(tokens), (1, group))[:, None, :, None]
    first = mask_spec.first_visible(positions)

    def gathered(pool, iteration):
        part = pool[layer, jax.lax.dynamic_slice_in_dim(block_table, iteration * group_pages, group_pages, axis=1)]
        part = part.swapaxes(1, 2).reshape(num_blocks, slots, span, *pool.shape[4:])
        return part.astype(q.dtype) if pool.ndim == 5 else part[:, :, None, :]

    def attend(iteration, carry):
        best, total, mixed = carry
        these = gathered(k_pages, iteration)
        scores = jnp.einsum("nkrh,nkch->nkrc", rows, these, preferred_element_type=jnp.float32)
        if k_scales is not None:
            scores = scores * gathered(k_scales, iteration)
        keys = iteration * span * shard.num_ranks + key_at
        allowed = mask_spec.mask(query_at, keys)
        scores = jnp.where(allowed, scores, -jnp.inf)
        higher = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
        shrunk, exp_scores = jnp.exp(best - _finite(higher)), jnp.exp(scores - _finite(higher))
        read = keys < (positions + query_lens)[:, None]
        if not mask_spec.is_full_causal:
            read &= keys >= first[:, None]
        read = read[:, None, :, None]
        values = these[..., :value_dim] if v_pages is k_pages else gathered(v_pages, iteration)
        values = jnp.where(read, values, 0)  # values outside the visible range may be NaN
        weights = exp_scores
        if v_scales is not None:
            weights = exp_scores * jnp.where(read[..., 0][:, :, None], gathered(v_scales, iteration), 0)
        more = jnp.einsum("nkrc,nkch->nkrh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * shrunk + jnp.sum(exp_scores, axis=-1, keepdims=True), mixed * shrunk + more

    shape = (num_blocks, slots, group * tokens)
    start = (jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, value_dim)))
    whole = span * shard.num_ranks
    num_iterations = jnp.max(jnp.where(query_lens > 0, (positions + query_lens + whole - 1) // whole, 0))
    skipped = 0 if mask_spec.is_full_causal else jnp.min(jnp.where(query_lens > 0, first // whole, num_iterations))
    best, total, mixed = jax.lax.fori_loop(skipped, num_iterations, attend, start)
    by_token = (
        part.reshape(num_blocks, slots, group, tokens, -1).transpose(0, 3, 1, 2, 4) for part in (mixed, total, best)
    )
    return tuple(by_token)

"""Attention of new tokens over keys and values that lie in pages.

New tokens come in blocks of one request each: a block of one token for a decoding request, longer ones for a prompt's
chunks. A block attends to the pages of its row of the block table, of which its own tokens have been written already.
Pages may hold numbers of eight bits: a scale of each token and head multiplies its score, and its share of the values.
Where no values are kept (latent attention), they are the first numbers of the keys.

- loop: over groups of pages, as many as the longest row needs, with a running softmax. Any backend.
- native: on the CPU, a C++ kernel that reads each row's own pages and no more (ops/native; it needs a compiler).
"""

# Dims: L layers, N blocks, Q tokens of a block, P pages of a row, M pages of the pool, S tokens of a page,
# K key/value head slots, G query heads a slot, H head dim of keys, V of values, T tokens.
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.quantize import quantize
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.quantization.formats import QMAX

PagedBackend = Literal["loop", "native"]
PAGED_BACKENDS: tuple[PagedBackend, ...] = ("loop", "native")
_GROUP_TOKENS = 128  # keys of one iteration of the loop


class ContextShard(NamedTuple):
    """Which part of every page lies here, where ranks share pages out: number `rank` of `num_ranks` even ones."""

    rank: int | Array = 0
    num_ranks: int = 1


# Keys [L,M,K,S,H], and values [L,M,K,S,V] where they are kept; their scales [L,M,K,S] follow where those are of eight
# bits.
Pages = tuple[Array, ...]


def write_pages(
    pages: Pages,
    new: Sequence[Float[Array, "T K _"]],
    page: Int[Array, "T"],
    offset: Int[Array, "T"],
    layer: LayerIndex = 0,
) -> Pages:
    """pages with each new entry (a key, and a value where they are kept) of `layer` at its place; a page past the
    last drops it. In place where donated."""
    dtype = pages[0].dtype.name
    if dtype in QMAX:
        numbers, scales = zip(*(quantize(part, dtype) for part in new), strict=True)
        new = (*numbers, *scales)
    # Head by head: a scatter of all heads at once would want them side by side, and XLA:TPU copies the pool for it.
    head = jnp.arange(new[0].shape[1], dtype=jnp.int32)
    return tuple(
        old.at[layer, page[:, None], head, offset[:, None]].set(part.astype(old.dtype), mode="drop")
        for old, part in zip(pages, new, strict=True)
    )


def paged_attention(
    q: Float[Array, "N Q K G H"],
    pages: Pages,
    block_table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    query_lens: Int[Array, "N"],
    layer: LayerIndex = 0,
    sinks: Float[Array, "K G"] | None = None,
    *,
    mask_spec: MaskSpec,
    value_dim: int | None = None,
    backend: PagedBackend = "loop",
) -> Float[Array, "N Q K G V"]:
    """Each of a block's first `query_lens` tokens, at `positions` and following, over those tokens of `layer` up to
    itself that it sees.

    sinks: logits that take part in the softmax and add nothing. value_dim: V, where no values are kept. What comes of a
    block's other tokens is not to be used.
    """
    if backend == "native":
        return native.native_paged(
            q, pages, block_table, positions, query_lens, layer, sinks, mask_spec=mask_spec, value_dim=value_dim
        )
    mixed, total, best = _loop(
        q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, ContextShard()
    )
    if sinks is not None:
        shrunk, own = _with_sinks(best, sinks)
        mixed, total = mixed * shrunk, total * shrunk + own
    real = (jnp.arange(q.shape[1]) < query_lens[:, None])[:, :, None, None, None]
    # Scores that are all minus infinity have no softmax; tokens past `query_lens` see nothing.
    return jnp.where(total > 0, mixed / total, jnp.where(real, jnp.nan, 0.0)).astype(q.dtype)


def _with_sinks(best: Array, sinks: Float[Array, "K G"]) -> tuple[Array, Array]:
    """What sums of shares of exp(score - best) [...,K,G,1] are to be multiplied by, and what sinks add to them."""
    sinks = sinks.astype(jnp.float32)[..., None]
    higher = jnp.maximum(best, sinks)
    return jnp.exp(best - higher), jnp.exp(sinks - higher)


def _finite(best: Array) -> Array:
    """The best score, 0 where no key was seen yet: what exponentials subtract."""
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
    """As paged_attention over the part of every page that lies here, by the loop: what comes of it, and the logarithm
    of the sum of its shares; merge_attention makes one of several ranks'. float32.
    """
    mixed, total, best = _loop(q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, shard)
    some = jnp.maximum(total, 1e-30)
    return jnp.concatenate([mixed / some, jnp.where(total > 0, best + jnp.log(some), -jnp.inf)], axis=-1)


def merge_attention(
    parts: Float[Array, "C T K G V+1"], sinks: Float[Array, "K G"] | None = None
) -> Float[Array, "T K G V"]:
    """What attention over all keys gives, from partial_attention over each rank's. float32."""
    mixed, weight = parts[..., :-1], parts[..., -1:]
    best = jnp.max(weight, axis=0)
    rank_weight = jnp.exp(weight - _finite(best))
    mixed, total = jnp.sum(mixed * rank_weight, axis=0), jnp.sum(rank_weight, axis=0)
    if sinks is not None:
        shrunk, own = _with_sinks(best, sinks)
        mixed, total = mixed * shrunk, total * shrunk + own
    return mixed / jnp.maximum(total, 1e-30)  # of tokens that see nothing: 0


def split_pages(pages: Pages, value_dim: int | None) -> tuple[Array, Array, Array | None, Array | None]:
    """Keys, values, and the scales of both where there are any; values may be the first numbers of the keys."""
    both = (pages[0], pages[0]) if value_dim is not None else pages[:2]
    scales = pages[1:] if value_dim is not None else pages[2:]
    return *both, *((scales[0], scales[-1]) if scales else (None, None))


def _loop(q, pages, block_table, positions, query_lens, layer, mask_spec, value_dim, shard):
    """[N,Q,K,G,V] of values times shares, [N,Q,K,G,1] of shares, both to be divided by exp(the third, [N,Q,K,G,1])."""
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
        values = jnp.where(read, values, 0)  # what lies beyond, or behind what is seen, is anything, NaN too
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

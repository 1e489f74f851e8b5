"""Attention of new tokens over keys and values that lie in pages.

New tokens come in blocks of one request each: a block of one token for a decoding request, longer ones for a prompt's
chunks. A block attends to the pages of its row of the table, of which its own tokens have been written already.

- loop: over groups of pages, as many as the longest row needs, with a running softmax. Any backend.
- native: on the CPU, a C++ kernel that reads each row's own pages and no more (ops/native; it needs a compiler).
"""

# Dims: N blocks, Q tokens of a block, P pages of a row, M pages of the pool, S tokens of a page,
# K key/value head slots, G query heads a slot, H head dim, T tokens.
from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.attention import MASKED, visible

PagedKind = Literal["loop", "native"]
PAGED_KINDS: tuple[PagedKind, ...] = ("loop", "native")
_GROUP_TOKENS = 128  # keys of one turn of the loop


def write_pages(
    pages: Float[Array, "M K S H"], new: Float[Array, "T K H"], page: Int[Array, "T"], offset: Int[Array, "T"]
) -> Float[Array, "M K S H"]:
    """pages with each new entry at its place; a page past the last drops it. In place where pages are donated."""
    return pages.at[page, :, offset].set(new.astype(pages.dtype), mode="drop")


def paged_attention(
    q: Float[Array, "N Q K G H"],
    k_pages: Float[Array, "M K S H"],
    v_pages: Float[Array, "M K S H"],
    table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    counts: Int[Array, "N"],
    *,
    window: int | None = None,
    kind: PagedKind = "loop",
) -> Float[Array, "N Q K G H"]:
    """Each of a block's first `counts` tokens, at `positions` and following, over cached tokens up to itself.

    window: the last so many of them, where given. What comes of a block's other tokens is not to be used.
    """
    if kind == "native":
        return native.native_paged(q, k_pages, v_pages, table, positions, counts, window=window)
    return _loop(q, k_pages, v_pages, table, positions, counts, window)


def _loop(q, k_pages, v_pages, table, positions, counts, window):
    num_blocks, tokens, slots, group, head_dim = q.shape
    page_size = k_pages.shape[2]
    pages = max(1, min(table.shape[1], _GROUP_TOKENS // page_size))
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    span = pages * page_size
    rows = (q * head_dim**-0.5).transpose(0, 2, 3, 1, 4).reshape(num_blocks, slots, group * tokens, head_dim)
    query_at = jnp.tile(positions[:, None] + jnp.arange(tokens), (1, group))[:, None, :, None]

    def gathered(pool, turn):
        part = pool[jax.lax.dynamic_slice_in_dim(table, turn * pages, pages, axis=1)]
        return part.swapaxes(1, 2).reshape(num_blocks, slots, span, head_dim)

    def attend(turn, carry):
        best, total, mixed = carry
        scores = jnp.einsum("nkrh,nkch->nkrc", rows, gathered(k_pages, turn), preferred_element_type=jnp.float32)
        allowed = visible(query_at, turn * span + jnp.arange(span), window)
        scores = jnp.where(allowed, scores, MASKED)
        higher = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
        shrunk = jnp.exp(best - higher)
        shares = jnp.where(allowed, jnp.exp(scores - higher), 0.0)
        written = (turn * span + jnp.arange(span) < (positions + counts)[:, None])[:, None, :, None]
        values = jnp.where(written, gathered(v_pages, turn), 0)  # what lies beyond is anything, NaN too
        more = jnp.einsum("nkrc,nkch->nkrh", shares.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * shrunk + jnp.sum(shares, axis=-1, keepdims=True), mixed * shrunk + more

    shape = (num_blocks, slots, group * tokens)
    start = (jnp.full((*shape, 1), MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, head_dim)))
    turns = jnp.max(jnp.where(counts > 0, (positions + counts + span - 1) // span, 0))
    _, total, mixed = jax.lax.fori_loop(0, turns, attend, start)
    y = (mixed / jnp.maximum(total, 1e-30)).astype(q.dtype)
    return y.reshape(num_blocks, slots, group, tokens, head_dim).transpose(0, 3, 1, 2, 4)

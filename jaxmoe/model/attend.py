"""The ways queries meet keys: within a prompt, or over pages into which the new keys are written first."""

# Dims: B batch, S length, K key/value head slots, G query heads a slot, H head dim; r ranks of the batch, each with
# t tokens, n blocks of them, p pages a row of the table.
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.paged import PagedKind, paged_attention, write_pages
from jaxmoe.sharding import Placement

KVPages = list[tuple[jax.Array, jax.Array]]
PAGE_DIMS = ("page", "kv_head", "page_token", "head_dim")


def empty_pages(config: ModelConfig, sizes: ArraySizes, *, num_pages: int, page_size: int, dtype: str) -> KVPages:
    """Keys and values [num_pages,K,page_size,H] of every layer, all zero. num_pages: of all ranks together."""
    shape = (num_pages, sizes.kv_slots, page_size, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]


_QUERY_DIMS = ("batch", "length", "kv_head", "head_slot", "head_dim")
_KEY_DIMS = ("batch", "length", "kv_head", "head_dim")


class CausalAttend:
    """Every token over those before it; nothing kept. Rows and heads are independent, so each device does its own."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> jax.Array:
        """See Attend."""
        del layer
        attend = partial(causal_attention, window=window)
        return self._placement.locally(attend, (q, _QUERY_DIMS), (k, _KEY_DIMS), (v, _KEY_DIMS), out=_QUERY_DIMS)


class Blocks(NamedTuple):
    """A rank's tokens as blocks of one request each, num_tokens long: where they stand and where their pages are.

    table [r,n,p]: pages of the block's request. positions [r,n]: of its first token. counts [r,n]: tokens it has.
    """

    num_tokens: int
    table: jax.Array
    positions: jax.Array
    counts: jax.Array


class PagedAttend:
    """New tokens over pages. Tokens [r*t,1] are those of every rank's blocks, one section after the other.

    `pages` holds the result.
    """

    def __init__(self, pages: KVPages, sections: Sequence[Blocks], placement: Placement, kind: PagedKind) -> None:
        self.pages, self._sections, self._placement, self._kind = list(pages), tuple(sections), placement, kind

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> jax.Array:
        """See Attend."""
        lengths = tuple(section.num_tokens for section in self._sections)
        blocks = [(section.table, section.positions, section.counts) for section in self._sections]
        per_block = (("batch", "block", "one"), ("batch", "block"), ("batch", "block"))
        mixed, keys, values = self._placement.locally(
            partial(_over_pages, lengths=lengths, window=window, kind=self._kind),
            (q, _QUERY_DIMS), (k, _KEY_DIMS), (v, _KEY_DIMS),
            *((pages, PAGE_DIMS) for pages in self.pages[layer]),
            *((array, dims) for section in blocks for array, dims in zip(section, per_block, strict=True)),
            out=(_QUERY_DIMS, PAGE_DIMS, PAGE_DIMS),
        )  # fmt: skip
        self.pages[layer] = (keys, values)
        return mixed


def _over_pages(q, k, v, keys, values, *blocks, lengths, window, kind):
    """One rank's part: q [t,1,K,G,H], k and v [t,1,K,H], its pages, and table, positions, counts of each section."""
    page_size, num_pages = keys.shape[2], keys.shape[0]
    sections = [tuple(part[0] for part in blocks[at : at + 3]) for at in range(0, len(blocks), 3)]
    page, offset = [], []
    for length, (table, positions, counts) in zip(lengths, sections, strict=True):
        at = positions[:, None] + jnp.arange(length)
        real = jnp.arange(length) < counts[:, None]
        own = jnp.take_along_axis(table, jnp.minimum(at // page_size, table.shape[1] - 1), axis=1)
        page.append(jnp.where(real, own, num_pages).reshape(-1))
        offset.append((at % page_size).reshape(-1))
    places = jnp.concatenate(page), jnp.concatenate(offset)
    keys, values = write_pages(keys, k[:, 0], *places), write_pages(values, v[:, 0], *places)
    mixed, start = [], 0
    for length, (table, positions, counts) in zip(lengths, sections, strict=True):
        stop = start + length * table.shape[0]
        part = q[start:stop].reshape(-1, length, *q.shape[2:])
        part = paged_attention(part, keys, values, table, positions, counts, window=window, kind=kind)
        mixed.append(part.reshape(stop - start, 1, *q.shape[2:]))
        start = stop
    return jnp.concatenate(mixed), keys, values

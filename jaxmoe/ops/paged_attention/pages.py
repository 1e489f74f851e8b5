"""Pages of the KV cache: their arrays, the parts of them that a rank holds, and writing to them."""

# Dims: L layers, M pages of the pool, S tokens of a page, K key/value head slots, H head dim of keys, V head dim of
# values, T tokens.
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.paged_attention.quantize import quantize
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.quantization.formats import QMAX


class ContextShard(NamedTuple):
    """Identify the part of every page that this context-parallel rank holds: part `rank` of `num_ranks` equal ones."""

    rank: int | Array = 0
    num_ranks: int = 1


# Keys [L,M,K,S,H] and, unless attention is latent, values [L,M,K,S,V]. 8-bit pages are followed by their scales
# [L,M,K,S].
Pages = tuple[Array, ...]


def write_pages(
    pages: Pages,
    new: Sequence[Float[Array, "T K _"]],
    page: Int[Array, "T"],
    offset: Int[Array, "T"],
    layer: LayerIndex = 0,
) -> Pages:
    """Write the keys and values of new tokens to `layer` of the pages, and return the pages.

    new: keys and, unless attention is latent, values. page, offset: slot mapping of the tokens; tokens with a page
    out of range are dropped. Donated pages are updated in place.
    """
    dtype = pages[0].dtype.name
    if dtype in QMAX:
        numbers, scales = zip(*(quantize(part, dtype) for part in new), strict=True)
        new = (*numbers, *scales)
    # The scatter indexes every head. One that writes all heads at once needs them adjacent, and XLA:TPU would copy the
    # pool for it.
    head = jnp.arange(new[0].shape[1], dtype=jnp.int32)
    return tuple(
        old.at[layer, page[:, None], head, offset[:, None]].set(part.astype(old.dtype), mode="drop")
        for old, part in zip(pages, new, strict=True)
    )


def split_pages(pages: Pages, value_dim: int | None) -> tuple[Array, Array, Array | None, Array | None]:
    """Return keys, values, and the scales of both or None. With value_dim (latent attention) values are the keys."""
    both = (pages[0], pages[0]) if value_dim is not None else pages[:2]
    scales = pages[1:] if value_dim is not None else pages[2:]
    return *both, *((scales[0], scales[-1]) if scales else (None, None))

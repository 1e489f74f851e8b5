"""Paged attention by a C++ kernel for CPUs (ops/native/paged.cc)."""

# Dims: N query blocks, Q tokens of a block, P pages of a row, K key/value head slots, G query heads of a slot, H head
# dim of keys, V head dim of values.
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.paged_attention.pages import Pages
from jaxmoe.ops.stack import LayerIndex


def paged_attention(
    q: Float[Array, "N Q K G H"],
    pages: Pages,
    block_table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    query_lens: Int[Array, "N"],
    layer: LayerIndex,
    sinks: Float[Array, "K G"] | None,
    *,
    mask_spec: MaskSpec,
    value_dim: int | None,
) -> Float[Array, "N Q K G V"]:
    """Compute ops.paged_attention. q is bfloat16 or float32; pages are bfloat16, float32, int8 or float8_e4m3fn."""
    block_metadata = (block_table, positions, query_lens, jnp.int32(layer))
    dim = pages[1].shape[4] if value_dim is None else value_dim
    cache = (pages[0], *pages) if value_dim is not None else pages  # latent: values are the keys, with the same scale
    cache = (*cache, cache[2]) if len(cache) == 3 else cache
    cache = cache if len(cache) == 4 else (*cache, jnp.zeros(0), jnp.zeros(0))
    own = jnp.zeros((0, 0)) if sinks is None else sinks.astype(jnp.float32)
    call = jax.ffi.ffi_call("jaxmoe_paged", jax.ShapeDtypeStruct((*q.shape[:-1], dim), q.dtype))
    limits = dict(window=np.int64(mask_spec.window or 0), chunk=np.int64(mask_spec.chunk or 0), value_dim=np.int64(dim))
    return call(q, *cache, *block_metadata, own, scale=np.float32(mask_spec.scale), **limits)

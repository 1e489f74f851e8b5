"""Indexing of arrays that stack several layers."""

from __future__ import annotations

import jax

LayerIndex = int | jax.Array  # index into the stack


def layer_of(stacked: jax.Array, layer: LayerIndex) -> jax.Array:
    """Return array [...] of `layer` from stacked [L, ...]. A stack of one layer is not copied."""
    if stacked.shape[0] == 1:
        return stacked.reshape(stacked.shape[1:])
    return jax.lax.dynamic_index_in_dim(stacked, layer, axis=0, keepdims=False)

"""One layer of arrays that hold many."""

from __future__ import annotations

import jax

LayerIndex = int | jax.Array  # which layer


def layer_of(stacked: jax.Array, layer: LayerIndex) -> jax.Array:
    """stacked [L, ...] -> [...] of `layer`; of one layer alone nothing is copied."""
    if stacked.shape[0] == 1:
        return stacked.reshape(stacked.shape[1:])
    return jax.lax.dynamic_index_in_dim(stacked, layer, axis=0, keepdims=False)

"""Reference of linear layers: one float32 matmul."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoe.ops.quantized_matmul import layer_weights


def linear(x, w, layer=0, num_valid=None, *, transposed: bool = False, dtype: str | None = None):
    """Define the result of ops.linear."""
    del num_valid
    matrix = layer_weights(w, layer, jnp.dtype(jnp.float32)).astype(jnp.float32)
    y = jnp.dot(x.astype(jnp.float32), matrix.T if transposed else matrix, precision="highest")
    return y.astype(dtype or x.dtype)

"""Linear layers by XLA's matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.ops.stack import layer_of


def linear(x, w, layer, num_valid=None, *, transposed: bool, dtype: str):
    """Compute ops.linear. It computes all rows."""
    del num_valid
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, layer_of(w, layer), contracted, preferred_element_type=jnp.dtype(dtype))

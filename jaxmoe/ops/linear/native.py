"""Linear layers by a C++ kernel for CPUs (ops/native/linear.cc). Gradients are those of XLA's matmul."""

# Dims: T tokens, K inputs (contracted), N outputs, L layers.
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.linear import xla
from jaxmoe.ops.stack import LayerIndex


def linear(x, w, layer, num_valid=None, *, transposed: bool, dtype: str):
    """Compute ops.linear, by XLA if there are too many tokens for the kernel."""
    if x.shape[0] > native.max_tokens(x.dtype.name):
        return xla.linear(x, w, layer, transposed=transposed, dtype=dtype)
    return _linear(transposed, dtype, x, w, layer, x.shape[0] if num_valid is None else num_valid)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
    transposed: bool,
    dtype: str,
    x: Float[Array, "T K"],
    w: Float[Array, "L K N"] | Float[Array, "L N K"],
    layer: LayerIndex,
    num_valid: int | jax.Array,
) -> Float[Array, "T N"]:
    """Call the kernel. x and w are bfloat16 or float32.

    dtype: of the result; bfloat16 inputs give bfloat16 or float32, float32 inputs float32.
    """
    columns = w.shape[1 if transposed else 2]
    call = jax.ffi.ffi_call("jaxmoe_linear", jax.ShapeDtypeStruct((x.shape[0], columns), jnp.dtype(dtype)))
    return call(x, w, jnp.int32(layer), jnp.int32(num_valid), transposed=transposed)


def _linear_fwd(transposed: bool, dtype: str, x, w, layer, num_valid):
    return _linear(transposed, dtype, x, w, layer, num_valid), (x, w, layer)


def _linear_bwd(transposed: bool, dtype: str, saved, dy):
    x, w, layer = saved
    dx, dw = jax.vjp(lambda x, w: xla.linear(x, w, layer, transposed=transposed, dtype=dtype), x, w)[1](dy)
    return dx, dw, None, None


_linear.defvjp(_linear_fwd, _linear_bwd)

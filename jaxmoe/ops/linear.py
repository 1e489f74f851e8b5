"""Linear layers: matmuls of tokens with one matrix.

- xla: XLA's matmul. Any platform, any dtype.
- native: a C++ kernel for CPUs (ops/native; needs a compiler). It reads the matrix at memory bandwidth for few tokens,
  and a token's result does not depend on other tokens. Falls back to xla for gradients, and for many tokens if the
  processor multiplies bfloat16 in hardware.

Quantized matrices are multiplied by ops/quantized_matmul.py, regardless of the backend.
"""

# Dims: T tokens, K inputs (contracted), N outputs, L layers.
from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.quantized_matmul import QuantizedArray, multiply
from jaxmoe.ops.stack import LayerIndex, layer_of

LinearBackend = Literal["xla", "native"]
LINEAR_BACKENDS: tuple[LinearBackend, ...] = ("xla", "native")


def linear(
    x: Float[Array, "T K"],
    w: Float[Array, "L K N"] | Float[Array, "L N K"] | QuantizedArray,
    layer: LayerIndex = 0,
    num_valid: int | jax.Array | None = None,
    *,
    backend: LinearBackend = "xla",
    transposed: bool = False,
    dtype: str | None = None,
) -> Float[Array, "T N"]:
    """Return x W, or x W^T if transposed, where W is `layer` of w. Accumulates in float32.

    num_valid: number of leading rows of x that are valid; the outputs of the other rows are finite but undefined.
    dtype: dtype of the result, by default x's.
    """
    dtype = x.dtype.name if dtype is None else dtype
    if isinstance(w, QuantizedArray):
        assert not transposed
        return multiply(x, w, (layer,)).astype(dtype)
    if backend == "native" and x.shape[0] <= native.max_tokens(x.dtype.name):
        return _native(transposed, dtype, x, w, layer, x.shape[0] if num_valid is None else num_valid)
    return _xla(transposed, dtype, x, w, layer)


def _xla(transposed: bool, dtype: str, x, w, layer):
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, layer_of(w, layer), contracted, preferred_element_type=jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _native(transposed: bool, dtype: str, x, w, layer, num_valid):
    return native.native_linear(x, w, layer, num_valid, transposed=transposed, dtype=dtype)


def _native_fwd(transposed: bool, dtype: str, x, w, layer, num_valid):
    return _native(transposed, dtype, x, w, layer, num_valid), (x, w, layer)


def _native_bwd(transposed: bool, dtype: str, saved, dy):
    x, w, layer = saved
    dx, dw = jax.vjp(lambda x, w: _xla(transposed, dtype, x, w, layer), x, w)[1](dy)
    return dx, dw, None, None


_native.defvjp(_native_fwd, _native_bwd)

"""Products of tokens with one matrix.

- xla: the compiler's own product. Any backend, any dtype.
- native: on the CPU, a C++ kernel (ops/native; it needs a compiler) that reads the matrix at memory's speed for few
  tokens, and whose result for a token does not depend on the others; xla for gradients, and for many tokens where the
  processor multiplies bfloat16 itself.
"""

# Dims: T tokens, K numbers summed over, N columns.
from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops import native

LinearKind = Literal["xla", "native"]
LINEAR_KINDS: tuple[LinearKind, ...] = ("xla", "native")


def linear(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"] | Float[Array, "N K"],
    *,
    kind: LinearKind = "xla",
    transposed: bool = False,
    dtype: str | None = None,
) -> Float[Array, "T N"]:
    """x W, or x W^T where transposed, in dtype (that of x by default); products sum in float32."""
    dtype = x.dtype.name if dtype is None else dtype
    if kind == "native" and x.shape[0] <= native.most_tokens(x.dtype.name):
        return _native(transposed, dtype, x, w)
    return _xla(transposed, dtype, x, w)


def _xla(transposed: bool, dtype: str, x, w):
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, contracted, preferred_element_type=jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _native(transposed: bool, dtype: str, x, w):
    return native.native_linear(x, w, transposed=transposed, dtype=dtype)


def _native_bwd(transposed: bool, dtype: str, saved, dy):
    return jax.vjp(partial(_xla, transposed, dtype), *saved)[1](dy)


_native.defvjp(lambda transposed, dtype, x, w: (_native(transposed, dtype, x, w), (x, w)), _native_bwd)

"""Linear layers: matmuls of tokens with one matrix.

Quantized matrices are multiplied by ops/quantized_matmul, regardless of the backend.
"""

# Dims: T tokens, K inputs (contracted), N outputs, L layers.
from __future__ import annotations

import jax
from jaxtyping import Array, Float

from jaxmoe.ops.linear.backends import BACKENDS, LinearBackend
from jaxmoe.ops.quantized_matmul import QuantizedArray, multiply
from jaxmoe.ops.stack import LayerIndex


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
    return BACKENDS[backend].kernels["linear"](x, w, layer, num_valid, transposed=transposed, dtype=dtype)

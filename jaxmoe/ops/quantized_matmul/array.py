"""Quantized matrices on devices: numbers and scales as arrays, and the numbers that they represent."""

# Dims: K inputs, N outputs; k, n blocks along them; L layers.
from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxmoe.ops.stack import LayerIndex, layer_of

_TWICE_E2M1 = 0xC8643210  # twice each of the eight 3-bit magnitudes, 4 bits per entry
_E4M3_BIAS = (127 - 7) << 23  # difference of the exponent biases of float32 and float8_e4m3fn
_MIN_NORMAL = 2.0**-6  # smallest normal float8_e4m3fn


class QuantizedArray(NamedTuple):
    """Store matrices [*lead, K, N] as quantized numbers and the scales [*lead, k, n] of blocks of K / k by N / n.

    There are three formats (quantization/formats.py):

    - int8 numbers with float32 scales.
    - uint8 numbers with float32 scales: the bits of float8_e4m3fn. They are uint8 because XLA's CPU compiler widens a
      whole float8 array before any loop over parts of it.
    - uint8 numbers [*lead, K / 2, N] with uint8 scales: two mxfp4 numbers per byte, the first in its low half.
    """

    numbers: Shaped[Array, "*lead K N"]
    scales: Shaped[Array, "*lead k n"]


Weights = jax.Array | QuantizedArray


def as_matrices(w: Weights, over: int) -> Weights:
    """Reshape weights [L, *in, *out] with `over` input dims to [L, K, N]."""
    if isinstance(w, QuantizedArray):
        return QuantizedArray(*(_as_matrices(part, over) for part in w))
    return _as_matrices(w, over)


def _as_matrices(w: jax.Array, over: int) -> jax.Array:
    return w.reshape(len(w), math.prod(w.shape[1 : 1 + over]), -1)


def layer_weights(w: Weights, layer: LayerIndex, dtype: jnp.dtype) -> jax.Array:
    """Return the matrices of one layer; quantized ones are dequantized as a whole."""
    if isinstance(w, QuantizedArray):
        return dequantized(QuantizedArray(*(layer_of(part, layer) for part in w)), dtype)
    return layer_of(w, layer)


def dequantized(w: QuantizedArray, dtype: jnp.dtype) -> Float[Array, "*lead K N"]:
    """Dequantize all matrices at once. This is the oracle of `multiply`."""
    planes = [scale_blocks(plane, w.scales) for plane in planes_of(w)]
    stacked = jnp.stack(planes, axis=-2)  # the numbers of a byte are adjacent along the inputs
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1]).astype(dtype)


def planes_of(w: QuantizedArray) -> list[jax.Array]:
    """Return the numbers as float32: one array, or for mxfp4 the first number of every byte, then the second."""
    if w.numbers.dtype == jnp.int8:
        return [w.numbers.astype(jnp.float32)]
    bits = w.numbers.astype(jnp.uint32)
    return [_e4m3(bits)] if w.scales.dtype == jnp.float32 else [_e2m1(bits), _e2m1(bits >> 4)]


def _e4m3(bits: jax.Array) -> jax.Array:
    """Decode the bits of float8_e4m3fn to float32; exact even where subnormal float32 numbers are flushed to zero."""
    size = bits & 0x7F
    small = size < 8  # subnormal
    value = jax.lax.bitcast_convert_type((jnp.where(small, size | 8, size) << 20) + jnp.uint32(_E4M3_BIAS), jnp.float32)
    value = jnp.where(small, value - _MIN_NORMAL, value)
    value = jnp.where(size == 0x7F, jnp.nan, value)
    return jnp.where(bits > 0x7F, -value, value)


def _e2m1(bits: jax.Array) -> jax.Array:
    """Decode the low four bits as float4_e2m1fn: a sign, two exponent bits, one mantissa bit."""
    twice = (jnp.uint32(_TWICE_E2M1) >> ((bits & 7) * 4)) & 15
    value = twice.astype(jnp.int32).astype(jnp.float32) * 0.5
    return jnp.where(bits & 8, -value, value)


def scale_factors(scales: jax.Array) -> jax.Array:
    """Return scales as float32. 8-bit scales are exponents of two; the smallest one, 2**-127, becomes 0."""
    if scales.dtype != jnp.uint8:
        return scales
    return jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def scale_blocks(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiply numbers [..., K, N] by the scales [..., k, n] of their blocks."""
    *lead, rows, columns = numbers.shape
    high, wide = scales.shape[-2:]
    blocks = numbers.reshape(*lead, high, rows // high, wide, columns // wide)
    return (blocks * scale_factors(scales)[..., :, None, :, None]).reshape(numbers.shape)

"""Matmuls with quantized matrices, which are read in their quantized dtype and dequantized a few columns at a time."""

# Dims: T tokens, K inputs, N outputs; k, n blocks along them; L layers.
from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxmoe.ops.stack import LayerIndex, layer_of

_TILE_BYTES = 2 << 20  # size of a tile of columns that is dequantized at once
_LANES = 128  # a tile's number of columns is a multiple of this
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
    planes = [_scaled(plane, w.scales) for plane in _planes(w)]
    stacked = jnp.stack(planes, axis=-2)  # the numbers of a byte are adjacent along the inputs
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1]).astype(dtype)


def _planes(w: QuantizedArray) -> list[jax.Array]:
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


def _factors(scales: jax.Array) -> jax.Array:
    """Return scales as float32. 8-bit scales are exponents of two; the smallest one, 2**-127, becomes 0."""
    if scales.dtype != jnp.uint8:
        return scales
    return jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def _scaled(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiply numbers [..., K, N] by the scales [..., k, n] of their blocks."""
    *lead, rows, columns = numbers.shape
    high, wide = scales.shape[-2:]
    blocks = numbers.reshape(*lead, high, rows // high, wide, columns // wide)
    return (blocks * _factors(scales)[..., :, None, :, None]).reshape(numbers.shape)


def multiply(x: Float[Array, "T K"], w: QuantizedArray, index: tuple[LayerIndex, ...]) -> Float[Array, "T N"]:
    """Multiply x by the matrix at `index` of w's leading dims, in float32.

    A loop dequantizes the columns in tiles of _TILE_BYTES. A whole matrix is dequantized only if it has fewer columns
    than two of the smallest tiles. The loop has at least two iterations, because XLA's CPU compiler dequantizes the
    matrices of all layers at once if they are outside a loop.
    """
    columns = w.numbers.shape[-1]
    step = math.lcm(columns // w.scales.shape[-1], _LANES)
    tile = max(step, _TILE_BYTES // (x.shape[1] * x.dtype.itemsize) // step * step)
    num_tiles = max(-(-columns // tile), min(2, columns // step))
    if num_tiles <= 1:
        return _times(x, _columns(w, index, 0, columns))
    tile = -(-columns // num_tiles // step) * step

    def compute_tile(i, y):
        first = jnp.minimum(i * tile, columns - tile)  # tiles may overlap at the end: some columns are computed twice
        return jax.lax.dynamic_update_slice(y, _times(x, _columns(w, index, first, tile)), (0, first))

    return jax.lax.fori_loop(0, -(-columns // tile), compute_tile, jnp.zeros((x.shape[0], columns), jnp.float32))


def _columns(w: QuantizedArray, index: tuple[LayerIndex, ...], first: int | jax.Array, count: int) -> QuantizedArray:
    """Slice columns [first, first + count) of one matrix without copying the matrix. Both are multiples of a block."""
    block = w.numbers.shape[-1] // w.scales.shape[-1]

    def part(array, first, count):
        size = (*(1,) * len(index), array.shape[-2], count)
        return jax.lax.dynamic_slice(array, (*index, 0, first), size).reshape(array.shape[-2], count)

    return QuantizedArray(part(w.numbers, first, count), part(w.scales, first // block, -(-count // block)))


def _times(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Multiply x [T,K] by a matrix, in float32. If one scale covers all inputs, it is applied to the product."""
    high, wide = w.scales.shape
    columns = w.numbers.shape[1]
    planes = _planes(w)
    if high > 1:
        planes = [_scaled(plane, w.scales) for plane in planes]
    parts = [x[:, index :: len(planes)] for index in range(len(planes))]
    matmuls = [_product(part, plane) for part, plane in zip(parts, planes, strict=True)]
    y = matmuls[0] if len(matmuls) == 1 else matmuls[0] + matmuls[1]
    return y if high > 1 else y * jnp.repeat(_factors(w.scales)[0], columns // wide, total_repeat_length=columns)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x by a float32 tile. The tile is rounded to x's dtype, except on CPUs, which compute in float32."""
    rounded = lambda x, w: jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)  # noqa: E731
    if x.dtype == jnp.float32:
        return rounded(x, w)
    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: rounded(x.astype(jnp.float32), w), default=rounded)

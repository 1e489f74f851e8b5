"""Products with matrices that are kept quantized: read at their own width, dequantized a few columns at a time."""

# Dims: T tokens, K inputs, N outputs; k, n blocks along them; L layers.
from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxmoe.ops.stack import LayerIndex, layer_of

_TILE_BYTES = 2 << 20  # of columns that are dequantized at once
_LANES = 128  # columns that a tile's are a multiple of
_TWICE_E2M1 = 0xC8643210  # twice the eight values of three bits, in four bits each
_E4M3_BIAS = (127 - 7) << 23  # what an exponent of float8_e4m3fn lacks of one of float32
_MIN_NORMAL = 2.0**-6  # of float8_e4m3fn


class QuantizedArray(NamedTuple):
    """Matrices [*lead, K, N] as numbers and the scales [*lead, k, n] of their blocks of K / k by N / n.

    numbers: int8 with float32 scales; uint8 with float32 scales, the bits of float8_e4m3fn (XLA's CPU compiler widens
    arrays of such floats whole before any loop over parts of them); or uint8 [*lead, K / 2, N] with uint8 scales, two
    mxfp4 numbers an item, the first in its low half (quantization/formats.py).
    """

    numbers: Shaped[Array, "*lead K N"]
    scales: Shaped[Array, "*lead k n"]


Weights = jax.Array | QuantizedArray


def as_matrices(w: Weights, over: int) -> Weights:
    """[L, *in, *out], of which `over` dims are inputs, as [L, K, N]."""
    if isinstance(w, QuantizedArray):
        return QuantizedArray(*(_as_matrices(part, over) for part in w))
    return _as_matrices(w, over)


def _as_matrices(w: jax.Array, over: int) -> jax.Array:
    return w.reshape(len(w), math.prod(w.shape[1 : 1 + over]), -1)


def layer_weights(w: Weights, layer: LayerIndex, dtype: jnp.dtype) -> jax.Array:
    """The matrices of one layer, plain: those that are quantized are dequantized whole."""
    if isinstance(w, QuantizedArray):
        return dequantized(QuantizedArray(*(layer_of(part, layer) for part in w)), dtype)
    return layer_of(w, layer)


def dequantized(w: QuantizedArray, dtype: jnp.dtype) -> Float[Array, "*lead K N"]:
    """Plain matrices, all at once: the oracle."""
    planes = [_scaled(plane, w.scales) for plane in _planes(w)]
    stacked = jnp.stack(planes, axis=-2)  # numbers of an item follow each other along the inputs
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1]).astype(dtype)


def _planes(w: QuantizedArray) -> list[jax.Array]:
    """The numbers as float32: all of them, or the first of every item and the second."""
    if w.numbers.dtype == jnp.int8:
        return [w.numbers.astype(jnp.float32)]
    bits = w.numbers.astype(jnp.uint32)
    return [_e4m3(bits)] if w.scales.dtype == jnp.float32 else [_e2m1(bits), _e2m1(bits >> 4)]


def _e4m3(bits: jax.Array) -> jax.Array:
    """Values of float8_e4m3fn, exact wherever float32 numbers below the normal ones are flushed to zero."""
    size = bits & 0x7F
    small = size < 8  # below the normal ones
    value = jax.lax.bitcast_convert_type((jnp.where(small, size | 8, size) << 20) + jnp.uint32(_E4M3_BIAS), jnp.float32)
    value = jnp.where(small, value - _MIN_NORMAL, value)
    value = jnp.where(size == 0x7F, jnp.nan, value)
    return jnp.where(bits > 0x7F, -value, value)


def _e2m1(bits: jax.Array) -> jax.Array:
    """Values of numbers of a sign, two bits of exponent and one of mantissa, from the low four bits."""
    twice = (jnp.uint32(_TWICE_E2M1) >> ((bits & 7) * 4)) & 15
    value = twice.astype(jnp.int32).astype(jnp.float32) * 0.5
    return jnp.where(bits & 8, -value, value)


def _factors(scales: jax.Array) -> jax.Array:
    """Scales as float32; those of eight bits are powers of two (the smallest, 2**-127, counts as 0)."""
    if scales.dtype != jnp.uint8:
        return scales
    return jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def _scaled(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """numbers [..., K, N] times the scales [..., k, n] of their blocks."""
    *lead, rows, columns = numbers.shape
    high, wide = scales.shape[-2:]
    blocks = numbers.reshape(*lead, high, rows // high, wide, columns // wide)
    return (blocks * _factors(scales)[..., :, None, :, None]).reshape(numbers.shape)


def multiply(x: Float[Array, "T K"], w: QuantizedArray, index: tuple[LayerIndex, ...]) -> Float[Array, "T N"]:
    """x times the one matrix at index of w's leading dims, in float32.

    Columns are dequantized in tiles of _TILE_BYTES, in a loop; never a whole matrix, unless it has fewer columns than
    two tiles have at least: what stands in no loop, XLA's CPU compiler makes ready for all layers at once.
    """
    columns = w.numbers.shape[-1]
    step = math.lcm(columns // w.scales.shape[-1], _LANES)
    tile = max(step, _TILE_BYTES // (x.shape[1] * x.dtype.itemsize) // step * step)
    num_tiles = max(-(-columns // tile), min(2, columns // step))
    if num_tiles <= 1:
        return _times(x, _columns(w, index, 0, columns))
    tile = -(-columns // num_tiles // step) * step

    def compute_tile(i, y):
        first = jnp.minimum(i * tile, columns - tile)  # the last ones may be computed twice
        return jax.lax.dynamic_update_slice(y, _times(x, _columns(w, index, first, tile)), (0, first))

    return jax.lax.fori_loop(0, -(-columns // tile), compute_tile, jnp.zeros((x.shape[0], columns), jnp.float32))


def _columns(w: QuantizedArray, index: tuple[LayerIndex, ...], first: int | jax.Array, count: int) -> QuantizedArray:
    """Some columns of one matrix, read where they lie. first, count: whole blocks."""
    block = w.numbers.shape[-1] // w.scales.shape[-1]

    def part(array, first, count):
        size = (*(1,) * len(index), array.shape[-2], count)
        return jax.lax.dynamic_slice(array, (*index, 0, first), size).reshape(array.shape[-2], count)

    return QuantizedArray(part(w.numbers, first, count), part(w.scales, first // block, -(-count // block)))


def _times(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """x [T,K] times a matrix, in float32; a scale for all inputs is applied to the product."""
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
    """x times a float32 tile, which is rounded to x's dtype where there are units for products of it."""
    rounded = lambda x, w: jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)  # noqa: E731
    if x.dtype == jnp.float32:
        return rounded(x, w)
    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: rounded(x.astype(jnp.float32), w), default=rounded)

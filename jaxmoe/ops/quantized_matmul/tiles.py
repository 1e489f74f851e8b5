"""Matmuls with quantized matrices, which are read in their quantized dtype and dequantized a few columns at a time."""

# Dims: T tokens, K inputs, N outputs.
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops.quantized_matmul.array import QuantizedArray, planes_of, scale_blocks, scale_factors
from jaxmoe.ops.stack import LayerIndex

_TILE_BYTES = 2 << 20  # size of a tile of columns that is dequantized at once
_LANES = 128  # a tile's number of columns is a multiple of this


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
    planes = planes_of(w)
    if high > 1:
        planes = [scale_blocks(plane, w.scales) for plane in planes]
    parts = [x[:, index :: len(planes)] for index in range(len(planes))]
    matmuls = [_product(part, plane) for part, plane in zip(parts, planes, strict=True)]
    y = matmuls[0] if len(matmuls) == 1 else matmuls[0] + matmuls[1]
    return y if high > 1 else y * jnp.repeat(scale_factors(w.scales)[0], columns // wide, total_repeat_length=columns)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x by a float32 tile. The tile is rounded to x's dtype, except on CPUs, which compute in float32."""
    rounded = lambda x, w: jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)  # noqa: E731
    if x.dtype == jnp.float32:
        return rounded(x, w)
    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: rounded(x.astype(jnp.float32), w), default=rounded)

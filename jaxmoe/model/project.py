"""Products of activations and parameters, with their collectives."""

# Dims: B batch, S length.
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmoe.model.params import Matrix, dims_of, weights_of
from jaxmoe.ops.linear import LinearBackend, linear
from jaxmoe.ops.quantized_matmul import QuantizedArray, Weights, as_matrices
from jaxmoe.ops.stack import LayerIndex, layer_of
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim


def project(
    x: jax.Array,
    param: Matrix,
    placement: MeshPlacement,
    backend: LinearBackend,
    layer: LayerIndex | None = None,
    num_valid: jax.Array | None = None,
    *,
    over: int = 1,
    transposed: bool = False,
    dtype: str | None = None,
    token_dim: TokenDim | Literal["batch"] = "token",
) -> jax.Array:
    """Multiply x [B,S,*in] by param [*in,*out] and return [B,S,*out].

    over: number of dims of in. transposed: whether param is [out,in]. layer: index into the leading layer dim of param,
    if it has one. dtype: of the result, by default the dtype of x. num_valid: see TokenMask. token_dim: logical dim of
    token rows that have the model's width; "sequence_sharded" rows are all-gathered before the product or
    reduce-scattered after it.

    A sharded contraction needs one all-reduce. XLA inserts it where it sees the product. It is explicit for opaque
    kernels, and for quantized matrices, because XLA must not split the loop over their tiles.
    """
    weights, dims = weights_of(param), dims_of(param)
    if layer is None:
        assert not isinstance(weights, QuantizedArray)
        weights, dims, layer = weights[None], ("unsharded", *dims), 0
    layer_dim, dims = dims[0], dims[1:]
    summed, kept = (dims[1:], dims[:1]) if transposed else (dims[:over], dims[over:])
    inside = "token" if token_dim == "sequence_sharded" else token_dim
    before, after = ((token_dim if part == ("width",) else inside, "length", *part) for part in (summed, kept))
    plain = partial(_plain, over=over, transposed=transposed, dtype=dtype)
    if backend == "xla" and token_dim != "sequence_sharded" and not isinstance(weights, QuantizedArray):
        return placement.constrain(plain(x, weights, layer), *after)
    sequence_axes = placement.sequence_gather_axes(token_dim) if token_dim == "sequence_sharded" else ()
    gather_axes, scatter_axes = (sequence_axes if part == ("width",) else () for part in (summed, kept))
    axes = tuple(axis for dim in summed for axis in placement.axes(dim) if placement.mesh.shape[axis] > 1)

    def part(x: jax.Array, w: Weights, layer: jax.Array, *num_valid: jax.Array) -> jax.Array:
        x = all_gather_rows(x, gather_axes)
        if backend == "xla" and not isinstance(w, QuantizedArray):
            return reduce_or_scatter(plain(x, w, layer), axes, scatter_axes)
        depth = math.prod(x.shape[2:])
        matrices = w if transposed else as_matrices(w, over)
        shape = (w.numbers if isinstance(w, QuantizedArray) else w).shape
        count = num_valid[0][0] if num_valid else None
        y = linear(x.reshape(-1, depth), matrices, layer, count, backend=backend, transposed=transposed, dtype=dtype)
        y = reduce_or_scatter(
            y.reshape(*x.shape[:2], *(shape[1:2] if transposed else shape[1 + over :])), axes, scatter_axes
        )
        return y

    arrays: list[Any] = [(x, before), (weights, (layer_dim, *dims)), (jnp.int32(layer), ())]
    arrays += [] if num_valid is None else [(num_valid, ("token",))]
    return placement.shard_map_local(part, *arrays, out=after)


def _plain(
    x: jax.Array, w: jax.Array, layer: LayerIndex, *, over: int, transposed: bool, dtype: str | None
) -> jax.Array:
    """Multiply by the matrix in its own dims: XLA:TPU would copy a matrix that is reshaped to two dims."""
    contracted = (tuple(range(2, 2 + over)), (1,) if transposed else tuple(range(over)))
    y_dtype = jnp.dtype(dtype or x.dtype)
    return jax.lax.dot_general(x, layer_of(w, layer), (contracted, ((), ())), preferred_element_type=y_dtype)


def all_gather_tokens(x: jax.Array, placement: MeshPlacement, token_dim: TokenDim) -> jax.Array:
    """Gather sequence-sharded x [B,S,D] before a tensor-parallel region. token_dim: logical dim of its rows.

    A caller that uses x in several products gathers once.
    """
    sequence_axes = placement.sequence_gather_axes(token_dim)
    if not sequence_axes:
        return x
    rest = ("length", "width")
    return placement.shard_map_local(
        lambda x: all_gather_rows(x, sequence_axes), (x, (token_dim, *rest)), out=("token", *rest)
    )


def all_gather_rows(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Gather the strips x [b,...] of the ranks along mesh axes. Called inside shard_map."""
    return jax.lax.all_gather(x, tuple(axes), axis=0, tiled=True) if axes else x


def reduce_or_scatter(y: jax.Array, axes: Sequence[str], scatter_axes: Sequence[str]) -> jax.Array:
    """Sum y [b,...] over mesh axes. Along scatter_axes each rank keeps its strip of the rows.

    Called inside shard_map. Runs a reduce-scatter, then an all-reduce over the remaining axes. Strips are a separate
    dim, because XLA:TPU turns a tiled reduce-scatter of many rows into an all-reduce.
    """
    if scatter_axes:
        strips = math.prod(jax.lax.axis_size(axis) for axis in scatter_axes)
        shape = y.shape
        y = jax.lax.psum_scatter(y.reshape(strips, -1, shape[-1]), tuple(scatter_axes), scatter_dimension=0)
        y = y.reshape(-1, *shape[1:])
    left = tuple(axis for axis in axes if axis not in scatter_axes)
    return jax.lax.psum(y, left) if left else y

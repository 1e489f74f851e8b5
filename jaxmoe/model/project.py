"""Multiplying activations by a parameter, wherever its parts lie."""

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
from jaxmoe.parallel.sharding import Placement, TokenDim


def project(
    x: jax.Array,
    param: Matrix,
    placement: Placement,
    backend: LinearBackend,
    layer: LayerIndex | None = None,
    num_valid: jax.Array | None = None,
    *,
    over: int = 1,
    transposed: bool = False,
    dtype: str | None = None,
    token_dim: TokenDim | Literal["batch"] = "token",
) -> jax.Array:
    """x [B,S,*in] times param [*in,*out] -> [B,S,*out] in dtype (that of x by default), where in is `over` dims.

    transposed: param is [out,in]. layer: which layer of a param that has a leading dim of them.
    num_valid: see TokenMask. token_dim: how rows lie where they have the model's width; "sequence_sharded" ones are
    gathered before the product, or scattered after it.

    One all-reduce where a summed dim is split: XLA's own, or the same one by hand where XLA cannot see inside or is not
    to split a loop over tiles of a quantized matrix.
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
    """By the matrix as it lies: XLA:TPU would copy one whose dims are made two."""
    contracted = (tuple(range(2, 2 + over)), (1,) if transposed else tuple(range(over)))
    y_dtype = jnp.dtype(dtype or x.dtype)
    return jax.lax.dot_general(x, layer_of(w, layer), (contracted, ((), ())), preferred_element_type=y_dtype)


def all_gather_tokens(x: jax.Array, placement: Placement, token_dim: TokenDim) -> jax.Array:
    """x [B,S,D], whose rows lie as `token_dim` says, as it is needed inside layers: for more than one product of it."""
    sequence_axes = placement.sequence_gather_axes(token_dim)
    if not sequence_axes:
        return x
    rest = ("length", "width")
    return placement.shard_map_local(
        lambda x: all_gather_rows(x, sequence_axes), (x, (token_dim, *rest)), out=("token", *rest)
    )


def all_gather_rows(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """The strips of x [b,...] that ranks along axes have, together. Called inside shard_map."""
    return jax.lax.all_gather(x, tuple(axes), axis=0, tiled=True) if axes else x


def reduce_or_scatter(y: jax.Array, axes: Sequence[str], scatter_axes: Sequence[str]) -> jax.Array:
    """The sum of y [b,...] over mesh axes; along those that are scattered each rank keeps its strip of the rows.

    Called inside shard_map: a reduce-scatter, then an all-reduce over the axes that are left. Strips are a dim of their
    own: of tiled ones of many rows XLA:TPU makes an all-reduce.
    """
    if scatter_axes:
        strips = math.prod(jax.lax.axis_size(axis) for axis in scatter_axes)
        shape = y.shape
        y = jax.lax.psum_scatter(y.reshape(strips, -1, shape[-1]), tuple(scatter_axes), scatter_dimension=0)
        y = y.reshape(-1, *shape[1:])
    left = tuple(axis for axis in axes if axis not in scatter_axes)
    return jax.lax.psum(y, left) if left else y

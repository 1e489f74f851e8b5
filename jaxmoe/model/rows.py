"""Row-wise ops on sharded arrays (token masks, norms, RoPE, SwiGLU), by XLA or by opaque kernels."""

# Dims: B batch, S length, D width, F ffn, H head dim.
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.ops.pointwise import PointwiseBackend, gated_unit, rotate, scale_by_rms, sum_of_squares
from jaxmoe.ops.pointwise import rms_norm as rms_norm_op
from jaxmoe.ops.registry import REGISTRY
from jaxmoe.parallel.sharding import Dims, MeshPlacement

HIDDEN = ("batch", "length", "width")
QUERY_DIMS = ("token", "length", "kv_head", "head_slot", "head_dim")
KEY_DIMS = ("token", "length", "kv_head", "head_dim")


def hidden_dims(token_dim: str) -> Dims:
    """Return the logical dims of hidden states [B,S,D] whose token rows have `token_dim`."""
    return (token_dim, *HIDDEN[1:])


class TokenMask(NamedTuple):
    """Mark valid tokens and their positions.

    valid [B,S]: False for padding. positions [B,S]. num_valid [n]: number of tokens up to the last valid one, for each
    shard of tokens inside layers. Kernels skip the tokens after it. Not computed if no kernel uses it.
    """

    valid: jax.Array
    positions: jax.Array
    num_valid: jax.Array | None


def make_token_mask(valid: jax.Array, positions: jax.Array, placement: MeshPlacement, *, count: bool) -> TokenMask:
    """Build a token mask from valid [B,S] and positions [B,S]. count: whether to compute num_valid."""

    def last(valid: jax.Array) -> jax.Array:
        index = jnp.arange(1, valid.size + 1, dtype=jnp.int32)
        return jnp.max(jnp.where(valid.reshape(-1), index, 0), keepdims=True)

    num_valid = placement.shard_map_local(last, (valid, ("token", "length")), out=("token",)) if count else None
    return TokenMask(valid, positions, num_valid)


_HALVES = ("token", "length", "unsharded")
_BACKENDS = REGISTRY["pointwise"]


def rms_norm(
    x: jax.Array, weight: jax.Array, dims: Dims, placement: MeshPlacement, backend: PointwiseBackend, *, eps: float
) -> jax.Array:
    """Apply RMS norm over the last of x's dims, which no mesh axis shards."""
    norm = partial(rms_norm_op, eps=eps, backend=backend)
    return _BACKENDS[backend].call_sharded(norm, placement, (x, dims), (weight, dims[-1:]), out=dims)


def mean_squares(
    q: jax.Array, k: jax.Array, columns: tuple[int, int], placement: MeshPlacement, backend: PointwiseBackend
) -> jax.Array:
    """Return the mean squares [B,S,2] of a query [B,S,K,G,H] and a key [B,S,K,H] over all heads, by one all-reduce.

    columns: number of columns of query and key over all devices.
    """
    axes = tuple(axis for axis in placement.axes("kv_head") if placement.mesh.shape[axis] > 1)

    def both(q: jax.Array, k: jax.Array) -> jax.Array:
        each = [sum_of_squares(x, backend=backend) / count for x, count in zip((q, k), columns, strict=True)]
        means = jnp.stack(each, axis=-1)
        return jax.lax.psum(means, axes) if axes else means

    return placement.shard_map_local(both, (q, QUERY_DIMS), (k, KEY_DIMS), out=_HALVES)


def qk_norm(
    x: jax.Array, weight: jax.Array, mean_square: jax.Array, dims: Dims, placement: MeshPlacement,
    backend: PointwiseBackend, *, eps: float,
) -> jax.Array:  # fmt: skip
    """Apply RMS norm to x [B,S,K,...] over all its heads, from their mean square [B,S]."""
    scale = partial(scale_by_rms, eps=eps, backend=backend)
    return _BACKENDS[backend].call_sharded(
        scale, placement, (x, dims), (weight, dims[2:]), (mean_square, dims[:2]), out=dims
    )


def apply_rope(
    x: jax.Array, cos: jax.Array, sin: jax.Array, dims: Dims, placement: MeshPlacement, backend: PointwiseBackend
) -> jax.Array:
    """Apply rotary position embedding to x [B,S,...,H] by cos and sin [B,S,H/2]."""
    rotate_fn = partial(rotate, backend=backend)
    return _BACKENDS[backend].call_sharded(rotate_fn, placement, (x, dims), (cos, _HALVES), (sin, _HALVES), out=dims)


def swiglu(gate: jax.Array, up: jax.Array, placement: MeshPlacement, backend: PointwiseBackend) -> jax.Array:
    """Return silu(gate) * up [B,S,F] of gate and up [B,S,F]."""

    def unit(gate: jax.Array, up: jax.Array) -> jax.Array:
        flat = (-1, gate.shape[2])
        return gated_unit(gate.reshape(flat), up.reshape(flat), backend=backend).reshape(gate.shape)

    dims = ("token", "length", "ffn")
    return _BACKENDS[backend].call_sharded(unit, placement, (gate, dims), (up, dims), out=dims)

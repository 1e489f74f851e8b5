"""Rows of sharded arrays: which are real, and their norms, rotations and gates, by XLA or by opaque kernels."""

# Dims: B batch, S length, D width, F ffn, H head dim.
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.ops.gate import gated_unit
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.pointwise import PointwiseKind
from jaxmoe.ops.rope import rotate
from jaxmoe.sharding import Dims, Placement

HIDDEN = ("batch", "length", "width")


class Real(NamedTuple):
    """Which tokens are real. active [B,S]; used [r]: of each rank's tokens, how many to the last real one, where
    kernels can leave out those that follow."""

    active: jax.Array
    used: jax.Array | None


def real_tokens(active: jax.Array, place: Placement, *, count: bool) -> Real:
    """Real tokens of active [B,S]; counted where `count`."""

    def last(active: jax.Array) -> jax.Array:
        place = jnp.arange(1, active.size + 1, dtype=jnp.int32)
        return jnp.max(jnp.where(active.reshape(-1), place, 0), keepdims=True)

    return Real(active, place.locally(last, (active, ("batch", "length")), out=("batch",)) if count else None)


_HALVES = ("batch", "length", "one")


def normed(
    x: jax.Array, weight: jax.Array, dims: Dims, place: Placement, kind: PointwiseKind, *, eps: float
) -> jax.Array:
    """RMS norm over the last of x's dims, which no axis splits."""
    norm = partial(rms_norm, eps=eps, kind=kind)
    return norm(x, weight) if kind == "xla" else place.locally(norm, (x, dims), (weight, dims[-1:]), out=dims)


def rotated(
    x: jax.Array, cos: jax.Array, sin: jax.Array, dims: Dims, place: Placement, kind: PointwiseKind
) -> jax.Array:
    """Rotary embedding of x [B,S,...,H] by cos and sin [B,S,H/2]."""
    turn = partial(rotate, kind=kind)
    if kind == "xla":
        return turn(x, cos, sin)
    return place.locally(turn, (x, dims), (cos, _HALVES), (sin, _HALVES), out=dims)


def gated(both: jax.Array, place: Placement, kind: PointwiseKind) -> jax.Array:
    """silu(gate) * up of both [B,S,2,F]: [B,S,F]."""

    def gate(both: jax.Array) -> jax.Array:
        return gated_unit(both.reshape(-1, *both.shape[2:]), kind=kind).reshape(*both.shape[:2], both.shape[3])

    lead = ("batch", "length")
    if kind == "xla":
        return gate(both)
    return place.locally(gate, (both, (*lead, "gate_or_up", "ffn")), out=(*lead, "ffn"))

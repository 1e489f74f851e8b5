"""Norms, rotations and gates of sharded arrays, by XLA or by kernels it cannot see into."""

# Dims: B batch, S length, D width, F ffn, H head dim.
from __future__ import annotations

from functools import partial

import jax

from jaxmoe.ops.gate import gated_unit
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.pointwise import PointwiseKind
from jaxmoe.ops.rope import rotate
from jaxmoe.sharding import Dims, Placement

HIDDEN = ("batch", "length", "width")
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

"""Gated activations: SwiGLU, and rows scaled by the sigmoid of a gate."""

# Dims: T tokens, F columns of an expert or MLP, D width.
from __future__ import annotations

import jax
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseBackend, differentiated_as


def gated_unit(
    gate: Float[Array, "T F"], up: Float[Array, "T F"], *, backend: PointwiseBackend = "xla"
) -> Float[Array, "T F"]:
    """Compute silu(gate) * up (SwiGLU). Source: Shazeer, GLU Variants Improve Transformer (2020)."""
    return (_native_unit if backend == "native" else _unit)(gate, up)


def _unit(gate, up):
    return jax.nn.silu(gate) * up


@differentiated_as(_unit)
def _native_unit(gate, up):
    return native.native_gated_unit(gate, up)


def gated_rows(
    x: Float[Array, "T D"], gates: Float[Array, "T 1"], *, backend: PointwiseBackend = "xla"
) -> Float[Array, "T D"]:
    """Multiply each row of x by the sigmoid of its gate."""
    return (_native_rows if backend == "native" else _rows)(x, gates)


def _rows(x, gates):
    return jax.nn.sigmoid(gates) * x


@differentiated_as(_rows)
def _native_rows(x, gates):
    return native.native_gated_rows(x, gates)

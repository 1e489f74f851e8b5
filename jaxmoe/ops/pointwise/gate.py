"""Gated activations: SwiGLU, and rows scaled by the sigmoid of a gate."""

# Dims: T tokens, F columns of an expert or MLP, D width.
from __future__ import annotations

from jaxtyping import Array, Float

from jaxmoe.ops.pointwise.backends import BACKENDS, PointwiseBackend


def gated_unit(
    gate: Float[Array, "T F"], up: Float[Array, "T F"], *, backend: PointwiseBackend = "xla"
) -> Float[Array, "T F"]:
    """Compute silu(gate) * up (SwiGLU). Source: Shazeer, GLU Variants Improve Transformer (2020)."""
    return BACKENDS[backend].kernels["gated_unit"](gate, up)


def gated_rows(
    x: Float[Array, "T D"], gates: Float[Array, "T 1"], *, backend: PointwiseBackend = "xla"
) -> Float[Array, "T D"]:
    """Multiply each row of x by the sigmoid of its gate."""
    return BACKENDS[backend].kernels["gated_rows"](x, gates)

"""Root-mean-square norms."""

# Dims: ... any leading dims, B batch, S length, D width.
from __future__ import annotations

from jaxtyping import Array, Float

from jaxmoe.ops.pointwise.backends import BACKENDS, PointwiseBackend


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], *, eps: float, backend: PointwiseBackend = "xla"
) -> Float[Array, "... D"]:
    """Divide x by its root mean square along the last dim and multiply by weight.

    Statistics are in float32, the result has x's dtype.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    return BACKENDS[backend].kernels["rms_norm"](x, weight, eps=eps)


def sum_of_squares(x: Float[Array, "B S *heads"], *, backend: PointwiseBackend = "xla") -> Float[Array, "B S"]:
    """Return the sum of squares over all head dims of each token, in float32."""
    return BACKENDS[backend].kernels["sum_of_squares"](x)


def scale_by_rms(
    x: Float[Array, "B S *heads"],
    weight: Float[Array, "*heads"],
    mean_square: Float[Array, "B S"],
    *,
    eps: float,
    backend: PointwiseBackend = "xla",
) -> Float[Array, "B S *heads"]:
    """Divide x by the root of a given mean square and multiply by weight.

    The caller computes the mean square, because it may extend over more dims than one device holds.
    """
    return BACKENDS[backend].kernels["scale_by_rms"](x, weight, mean_square, eps=eps)

"""Root-mean-square norms."""

# Dims: ... any leading dims, D width, K key/value head slots, H head dim.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseBackend, differentiated_as


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], *, eps: float, backend: PointwiseBackend = "xla"
) -> Float[Array, "... D"]:
    """Divide x by its root mean square along the last dim and multiply by weight.

    Statistics are in float32, the result has x's dtype.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    return (_native if backend == "native" else _xla)(x, weight, eps=eps)


def _xla(x, weight, *, eps):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


@differentiated_as(_xla)
def _native(x, weight, *, eps):
    return native.native_norm(x.reshape(-1, x.shape[-1]), weight, eps=eps).reshape(x.shape)


def sum_of_squares(x: Float[Array, "B S *heads"], *, backend: PointwiseBackend = "xla") -> Float[Array, "B S"]:
    """Return the sum of squares over all head dims of each token, in float32."""
    return (_native_squares if backend == "native" else _xla_squares)(x)


def _xla_squares(x):
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(2, x.ndim)))


@differentiated_as(_xla_squares)
def _native_squares(x):
    return native.native_squares(_rows(x)).reshape(x.shape[:2])


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
    return (_native_scaled if backend == "native" else _xla_scaled)(x, weight, mean_square, eps=eps)


def _xla_scaled(x, weight, mean_square, *, eps):
    scale = jax.lax.rsqrt(mean_square + eps).reshape(*mean_square.shape, *(1,) * weight.ndim)
    return weight * (x.astype(jnp.float32) * scale).astype(x.dtype)


@differentiated_as(_xla_scaled)
def _native_scaled(x, weight, mean_square, *, eps):
    return native.native_scaled(_rows(x), weight.reshape(-1), mean_square.reshape(-1), eps=eps).reshape(x.shape)


def _rows(x):
    """Reshape x to one row per token."""
    return x.reshape(x.shape[0] * x.shape[1], -1)

"""Root-mean-square norms."""

# Dims: ... any leading dims, D width, K key/value head slots, H head dim.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseKind, differentiated_as


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], *, eps: float, kind: PointwiseKind = "xla"
) -> Float[Array, "... D"]:
    """x over its root mean square along the last dim, times weight. Statistics in float32, result in x's dtype.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    return (_native if kind == "native" else _xla)(x, weight, eps=eps)


def _xla(x, weight, *, eps):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


@differentiated_as(_xla)
def _native(x, weight, *, eps):
    return native.native_norm(x.reshape(-1, x.shape[-1]), weight, eps=eps).reshape(x.shape)


def scale_by_rms(
    x: Float[Array, "B S *heads"], weight: Float[Array, "*heads"], mean_square: Float[Array, "B S"], *, eps: float
) -> Float[Array, "B S *heads"]:
    """x over the root of a mean square taken elsewhere (over more dims than one device holds), times weight."""
    scale = jax.lax.rsqrt(mean_square + eps).reshape(*mean_square.shape, *(1,) * weight.ndim)
    return weight * (x.astype(jnp.float32) * scale).astype(x.dtype)

"""Root-mean-square norms."""

# Dims: ... any leading dims, D width, K key/value head slots, H head dim.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], *, eps: float) -> Float[Array, "... D"]:
    """x over its root mean square along the last dim, times weight. Statistics in float32, result in x's dtype.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


def scale_by_rms(
    x: Float[Array, "B S *heads"], weight: Float[Array, "*heads"], mean_square: Float[Array, "B S"], *, eps: float
) -> Float[Array, "B S *heads"]:
    """x over the root of a mean square taken elsewhere (over more dims than one device holds), times weight."""
    scale = jax.lax.rsqrt(mean_square + eps).reshape(*mean_square.shape, *(1,) * weight.ndim)
    return weight * (x.astype(jnp.float32) * scale).astype(x.dtype)

"""Rotary position embedding, in the half-split form of published checkpoints."""

# Dims: B batch, S length, ... head dims, H head dim.
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.config import RopeConfig
from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseKind, differentiated_as


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position for each of the head_dim / 2 pairs, scaled as the config says. float32.

    Source: Su et al., RoFormer (2021); Llama 3.1's rope_scaling as published.
    """
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.scaling == "linear":
        frequency = frequency / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        frequency = blend * frequency + (1.0 - blend) * frequency / rope.factor
    return frequency.astype(np.float32)


def rotation(
    positions: Int[Array, "B S"], frequencies: np.ndarray
) -> tuple[Float[Array, "B S H/2"], Float[Array, "B S H/2"]]:
    """Cosine and sine of every position's angles, float32."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B S ... H"],
    cos: Float[Array, "B S H/2"],
    sin: Float[Array, "B S H/2"],
    *,
    kind: PointwiseKind = "xla",
) -> Float[Array, "B S ... H"]:
    """x with each pair (i, i + H/2) turned by its angle; computed in float32, returned in x's dtype."""
    return (_native if kind == "native" else _xla)(x, cos, sin)


def _xla(x, cos, sin):
    spread = (*cos.shape[:2], *(1,) * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(spread), sin.reshape(spread)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


@differentiated_as(_xla)
def _native(x, cos, sin):
    half = cos.shape[-1]
    y = native.native_rotate(x.reshape(cos.size // half, -1, 2 * half), cos.reshape(-1, half), sin.reshape(-1, half))
    return y.reshape(x.shape)

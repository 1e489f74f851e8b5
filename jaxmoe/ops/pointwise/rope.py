"""Rotary position embedding (RoPE), in the half-split form of published checkpoints."""

# Dims: B batch, S length, ... head dims, H head dim, R rotary dims: the first R of H are rotated.
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.config import RopeConfig
from jaxmoe.ops.pointwise.backends import BACKENDS, PointwiseBackend


def inverse_frequencies(rope: RopeConfig, rotary_dims: int) -> np.ndarray:
    """Return the rotation in radians per position of each of the rotary_dims / 2 pairs. float32.

    Applies the RoPE scaling of the config.

    Source: Su et al., RoFormer (2021); Llama 3.1's rope_scaling as published; YaRN (arXiv 2309.00071).
    """
    frequency = 1.0 / rope.theta ** (np.arange(0, rotary_dims, 2, dtype=np.float32) / rotary_dims)
    if rope.scaling == "linear":
        frequency = frequency / rope.factor
    if rope.scaling == "llama3":
        rotations = rope.original_max_position_embeddings * frequency / (2 * np.pi)
        width = rope.high_freq_factor - rope.low_freq_factor
        blend = (rotations - rope.low_freq_factor) / width if width else rotations >= rope.low_freq_factor
        frequency = _blended(np.clip(blend, 0.0, 1.0), frequency, rope.factor)
    if rope.scaling == "yarn":
        first, last = (_yarn_pair(rope, rotations, rotary_dims) for rotations in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, rotary_dims - 1)
        width = last - first or 0.001
        ramp = (np.arange(rotary_dims // 2, dtype=np.float32) - first) / width
        frequency = _blended(1.0 - np.clip(ramp, 0.0, 1.0), frequency, rope.factor)
    return frequency.astype(np.float32)


def _blended(kept: np.ndarray, frequency: np.ndarray, factor: float) -> np.ndarray:
    return kept * frequency + (1.0 - kept) * frequency / factor


def _yarn_pair(rope: RopeConfig, rotations: float, rotary_dims: int) -> float:
    """Return the (fractional) pair index that makes this number of rotations within the original context."""
    wavelength = rope.original_max_position_embeddings / (rotations * 2 * np.pi)
    return rotary_dims * np.log(wavelength) / (2 * np.log(rope.theta))


def rotation(
    positions: Int[Array, "B S"], frequencies: np.ndarray, factor: float = 1.0
) -> tuple[Float[Array, "B S R/2"], Float[Array, "B S R/2"]]:
    """Return cosine and sine of the angles at every position, multiplied by factor. float32."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B S ... H"],
    cos: Float[Array, "B S R/2"],
    sin: Float[Array, "B S R/2"],
    *,
    backend: PointwiseBackend = "xla",
) -> Float[Array, "B S ... H"]:
    """Rotate each pair (i, i + R/2) of the first R numbers of x by its angle; leave the others unchanged.

    Computed in float32, returned in x's dtype.
    """
    kernel, dims = BACKENDS[backend].kernels["rotate"], 2 * cos.shape[-1]
    if dims == x.shape[-1]:
        return kernel(x, cos, sin)
    return jnp.concatenate([kernel(x[..., :dims], cos, sin), x[..., dims:]], axis=-1)

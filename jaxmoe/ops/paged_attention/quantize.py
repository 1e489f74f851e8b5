"""8-bit quantization with one scale per row, used for the KV cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxmoe.quantization.formats import QMAX


def quantize(x: Float[Array, "*rows H"], dtype: str) -> tuple[Shaped[Array, "*rows H"], Float[Array, "*rows"]]:
    """Quantize x to dtype ("int8" or "float8_e4m3fn") with one float32 scale per row.

    Returns (numbers, scale), where x is about numbers * scale. A row of zeros has scale 0.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / QMAX[dtype]
    shrunk = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    return (jnp.round(shrunk) if dtype == "int8" else shrunk).astype(dtype), scale

"""Arrays in a stack of layers, of which only layer AT may be used: the others hold no numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LAYER = 1


def stacked(array: jax.Array) -> jax.Array:
    """[...] -> [3, ...] with the array as layer AT and junk in the others: NaN, or the largest number there is."""
    array = jnp.asarray(array)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    junk = jnp.full_like(array, jnp.nan if floating else jnp.iinfo(array.dtype).max)
    return jnp.stack([junk, array, junk])

"""The random numbers of sampling."""

# Dims: B rows.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, UInt32


def gumbel_noise(
    seed: UInt32[Array, "B"], seed_high: UInt32[Array, "B"], positions: Int[Array, "B"], vocab_size: int
) -> Float[Array, "B {vocab_size}"]:
    """Return Gumbel noise that depends on a row's seed and position only. It is the same on every backend.

    The generator is Threefry-2x32. Its key is (seed, position) for seeds of up to 32 bits, and Threefry of the position
    under the seed for larger ones.
    """

    def row(low: Array, high: Array, position: Array) -> Array:
        first, second = threefry_2x32((low, high), jnp.stack([position, jnp.zeros_like(position)]))
        key = jnp.where(high == 0, low, first), jnp.where(high == 0, position, second)
        bits = threefry_2x32(key, jnp.arange(vocab_size, dtype=jnp.uint32))
        uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0 + 2.0**-24
        return -jnp.log(-jnp.log(uniform))

    return jax.vmap(row)(seed, seed_high, positions.astype(jnp.uint32))

"""Declaring parameters: every one carries its logical dims, from which placement, loading and saving follow."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def normal(stddev: float) -> Init:
    """Draws from a normal distribution."""
    return jax.nn.initializers.normal(stddev)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All ones (norms)."""
    del key
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All zeros (biases)."""
    del key
    return jnp.zeros(shape, dtype)


class Maker:
    """Makes the parameters of one model: same dtype, keys drawn in turn."""

    def __init__(self, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self._rngs, self._dtype = rngs, dtype

    def __call__(self, init: Init, **dims: int) -> nnx.Param:
        """A parameter whose logical dims and sizes are given in order, as in width=64, ffn=256."""
        return nnx.Param(init(self._rngs.params(), tuple(dims.values()), self._dtype), dims=tuple(dims))

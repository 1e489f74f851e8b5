"""Declaring parameters: every one carries its logical dims and how it stands to the pipeline, from which placement,
loading and saving follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.depth import Segment
from jaxmoe.ops.stack import At, layer_of
from jaxmoe.sharding import View

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


def at_layer(param: nnx.Param, at: At) -> jax.Array:
    """The array of one layer of a stacked parameter."""
    return layer_of(param[...], at)


class Maker:
    """Makes the parameters of one model: same dtype, keys drawn in turn."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        lead: Mapping[str, int] = MappingProxyType({}),
        view: View = "beside",
    ) -> None:
        self._rngs, self._dtype, self._lead, self._view = rngs, dtype, lead, view

    def stacked(self, part: Segment) -> Maker:
        """A maker of parameters that hold the layers of a segment, in a leading dim."""
        return Maker(self._rngs, self._dtype, {"layer": part.slots}, "staged" if part.stages > 1 else "beside")

    def __call__(self, init: Init, **dims: int) -> nnx.Param:
        """A parameter whose logical dims and sizes are given in order, as in width=64, ffn=256."""
        dims = {**self._lead, **dims}
        array = init(self._rngs.params(), tuple(dims.values()), self._dtype)
        return nnx.Param(array, dims=tuple(dims), view=self._view)

    def exact(self, init: Init, **dims: int) -> nnx.Param:
        """The same in float32, whatever the dtype of the others."""
        return Maker(self._rngs, jnp.dtype(jnp.float32), self._lead, self._view)(init, **dims)

    def indices(self, **dims: int) -> nnx.Param:
        """The same for whole numbers that no checkpoint holds; zeros."""
        dims = {**self._lead, **dims}
        return nnx.Param(jnp.zeros(tuple(dims.values()), jnp.int32), dims=tuple(dims), view=self._view)

"""The parameter table: path, shape, dtype and sharding of every parameter of the abstract model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxmoe.families.parameters import Part
from jaxmoe.parallel.sharding import Dims, MeshPlacement


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """Describe one parameter: its path in the model, shape, dtype, logical dims, part of the model and sharding."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    dims: Dims
    part: Part
    sharding: NamedSharding

    @property
    def in_checkpoint(self) -> bool:
        """Return whether checkpoints have this parameter: true for all but the expert map."""
        return "expert_map" not in self.dims

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the unsharded array."""
        return math.prod(self.shape) * self.dtype.itemsize


def parameter_table(state: nnx.State, placement: MeshPlacement) -> list[ParamInfo]:
    """Return an entry for every parameter, in the order of the state's leaves."""
    table = []
    for path, param in nnx.to_flat_state(state):
        leaf = param.get_value() if hasattr(param, "get_value") else param.value
        metadata = param.get_metadata()
        dims = tuple(metadata["dims"])
        table.append(
            ParamInfo(
                path="/".join(str(part) for part in path), shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype),
                dims=dims, part=metadata["part"], sharding=placement.with_view(metadata["view"]).sharding(*dims),
            )
        )  # fmt: skip
    return table


def state_of(abstract: nnx.State, arrays: Iterable[jax.Array]) -> nnx.State:
    """Return the abstract state with its leaves replaced by arrays, in the order of the leaves."""
    return jax.tree.unflatten(jax.tree.structure(abstract), list(arrays))

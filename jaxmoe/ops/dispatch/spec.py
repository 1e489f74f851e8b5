"""The description of a token exchange, and the arrays that pass from dispatch to combine."""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, e experts of this rank, V maximum number of ranks
# that a token is sent to.
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

DispatchBackend = Literal["all_to_all", "all_gather", "ragged_all_to_all", "hierarchical", "hierarchical_ragged"]


@dataclass(frozen=True, kw_only=True)
class DispatchSpec:
    """Describe a token exchange: its mesh axes, number of ranks and backend.

    max_ranks: the most ranks that one token is sent to. platform: platform of the mesh's devices; "cpu" has no ragged
    all-to-all.
    """

    axes: tuple[str, ...]
    num_ranks: int
    max_ranks: int
    backend: DispatchBackend
    platform: str

    def levels(self) -> tuple[DispatchSpec, DispatchSpec]:
        """Return the outer and inner exchange of a hierarchical backend. Call inside shard_map.

        The outer exchange runs along the first axis with more than one rank, the inner one along the other axes.
        """
        sizes = {axis: jax.lax.axis_size(axis) for axis in self.axes}
        outer = next(axis for axis in self.axes if sizes[axis] > 1)
        inner = tuple(axis for axis in self.axes if axis != outer)
        first = replace(self, axes=(outer,), num_ranks=sizes[outer], backend="all_to_all")
        ranks = self.num_ranks // sizes[outer]
        backend: DispatchBackend = "ragged_all_to_all" if self.backend == "hierarchical_ragged" else "all_to_all"
        return first, replace(self, axes=inner, num_ranks=ranks, max_ranks=min(ranks, self.max_ranks), backend=backend)


class RowSlices(NamedTuple):
    """Store the row offset and row count of each rank's slice in a send or receive buffer."""

    offsets: Int[Array, "N"]
    sizes: Int[Array, "N"]


class DispatchState(NamedTuple):
    """Store the offsets and counts that combine needs to return the results of a ragged dispatch.

    rows: row indices of each token in the send buffer, out of range where unused. mine: slices sent to each rank. came:
    slices received from each rank. theirs: for each rank, the offset in its send buffer of the rows it sent to this
    rank.
    """

    rows: Int[Array, "t V"]
    mine: RowSlices
    came: RowSlices
    theirs: Int[Array, "N"]


class DispatchOutput(NamedTuple):
    """Hold the tokens of all ranks, their weights for this rank's experts, and the state that combine needs."""

    x: Float[Array, "N*t D"]
    weights: Float[Array, "N*t e"]
    sent: DispatchState | None

"""Expert-parallel dispatch and combine of tokens. Dropless; call these functions inside shard_map.

dispatch sends tokens to the ranks that hold their experts, with the combine weights of the receiving rank's experts.
combine returns, for this rank's own tokens, the sum of the expert outputs over all ranks. All backends compute the
same:

- all_to_all: every rank receives every token once, with the weights of its own experts. A token that is routed to
  several experts of one rank is still sent once. Shapes are static and must hold the worst case, so (N - 1) T rows
  travel each way.
- all_gather: all-gathers the tokens with all their weights and reduce-scatters the results. Moves as many rows.
- ragged_all_to_all: a rank receives only the tokens that are routed to one of its experts, each once. Shapes hold the
  worst case, so it uses as much memory as the other backends, but it moves fewer rows. XLA:CPU has no ragged
  all-to-all; there a static all-to-all gives the same result.
- hierarchical: exchanges along the outermost axis first, then along the other axes. A token is sent once to each group
  of inner ranks (a node), and then distributed inside the group. If the outer axis connects nodes, (nodes - 1) T rows
  leave a node instead of (N - inner) T; the number of rows that arrive is the same. Along a single axis it equals
  all_to_all. hierarchical_ragged is ragged along the other axes.
"""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, E experts, e experts of this rank, V maximum number
# of ranks that a token is sent to, W columns of an exchanged row.
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.parallel.sharding import MeshPlacement

DispatchBackend = Literal["all_to_all", "all_gather", "ragged_all_to_all", "hierarchical", "hierarchical_ragged"]
DISPATCH_BACKENDS: tuple[DispatchBackend, ...] = (
    "all_to_all", "all_gather", "ragged_all_to_all", "hierarchical", "hierarchical_ragged",
)  # fmt: skip
HIERARCHICAL: tuple[DispatchBackend, ...] = ("hierarchical", "hierarchical_ragged")
MAX_RAGGED_GPUS = 8  # the most ranks that XLA's GPU kernel supports; see docs/decisions/0008


def unsupported_reason(backend: str, placement: MeshPlacement) -> str | None:
    """Return why a backend is unsupported on this platform or mesh, or None if it is supported."""
    peers, levels = placement.ragged_peers(backend), placement.dispatch_levels
    if placement.platform == "gpu" and peers > MAX_RAGGED_GPUS:
        other = "all_to_all" if backend == "ragged_all_to_all" else "hierarchical"
        return f"reaches {MAX_RAGGED_GPUS} GPUs at most, experts are exchanged among {peers}: use {other}"
    if backend in HIERARCHICAL and len(levels) == 1:
        return (
            f"needs two or more expert axes, but experts are exchanged along {levels[0]} alone: shard experts over two "
            "axes, as expert=2,tensor=8 in layout dp-ep does, or use all_to_all"
        )
    return None


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


def dispatch(x: Float[Array, "t D"], weights: Float[Array, "t E"], exchange: DispatchSpec) -> DispatchOutput:
    """Send tokens to the ranks that hold their experts.

    The weights are concatenated to x and sent with it. Ragged backends also exchange row counts.
    """
    width, ranks = x.shape[1], exchange.num_ranks
    share = weights.shape[1] // ranks
    weights = weights.astype(x.dtype)
    if ranks == 1:
        return DispatchOutput(x, weights, None)
    if exchange.backend == "all_gather":
        packet = jax.lax.all_gather(jnp.concatenate([x, weights], axis=1), exchange.axes, axis=0, tiled=True)
        mine = jax.lax.axis_index(exchange.axes) * share
        return DispatchOutput(
            packet[:, :width], jax.lax.dynamic_slice_in_dim(packet[:, width:], mine, share, axis=1), None
        )
    if exchange.backend in HIERARCHICAL:
        outer, inner = exchange.levels()
        near = dispatch(x, weights, outer)
        return dispatch(near.x, near.weights, inner)
    by_rank = weights.reshape(-1, ranks, share)
    if exchange.backend == "ragged_all_to_all":
        packet, sent = _ragged_dispatch(x, by_rank, exchange)
        return DispatchOutput(packet[:, :width], packet[:, width:], sent)
    packet = jnp.concatenate([jnp.broadcast_to(x, (ranks, *x.shape)), by_rank.swapaxes(0, 1)], axis=2)
    packet = _to_every_rank(packet, exchange).reshape(-1, width + share)
    return DispatchOutput(packet[:, :width], packet[:, width:], None)


def combine(y: Float[Array, "N*t D"], sent: DispatchState | None, exchange: DispatchSpec) -> Float[Array, "t D"]:
    """Return the sum over ranks of the expert outputs for this rank's tokens. Runs one collective per level."""
    if exchange.num_ranks == 1:
        return y
    if exchange.backend in HIERARCHICAL:
        outer, inner = exchange.levels()
        return combine(combine(y, sent, inner), None, outer)
    if exchange.backend == "all_gather":
        # Ranks get their own dim, because XLA:TPU turns a tiled reduce-scatter of many rows into an all-reduce.
        return jax.lax.psum_scatter(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange.axes, scatter_dimension=0)
    if sent is not None:
        rows, num_tokens = sent.rows.size, y.shape[0] // exchange.num_ranks
        back = _ragged(y, rows, num_tokens, send=sent.came, to=sent.theirs, receive=sent.mine, exchange=exchange)
        return _sum_in_order([back.at[each].get(mode="fill", fill_value=0) for each in sent.rows.T])
    return _sum_in_order(_to_every_rank(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange))


def _to_every_rank(parts: Array, exchange: DispatchSpec) -> Array:
    """Exchange parts [N, ...] by all-to-all: send part n to rank n and return the part received from each rank."""
    return jax.lax.all_to_all(parts, exchange.axes, split_axis=0, concat_axis=0, tiled=True)


def _sum_in_order(parts: Any) -> Array:
    """Sum parts one after another in float32. The rounding of an XLA reduction depends on the number of tokens."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)


def _ragged_dispatch(x: Array, by_rank: Array, exchange: DispatchSpec) -> tuple[Array, DispatchState]:
    """Send each row of x [t,D] to the ranks for which its weights [t,N,e] are not all zero.

    Returns the received rows [N*t,W], where the rows from rank n start at row n*t, and the state for combine.
    """
    num_tokens, ranks, _ = by_rank.shape
    visits = jnp.any(by_rank != 0, axis=2)
    sizes = jnp.sum(visits, axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    num_rows = num_tokens * exchange.max_ranks
    row = starts + jnp.cumsum(visits, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(visits, row, num_rows)
    token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row.shape)
    rank = jnp.broadcast_to(jnp.arange(ranks, dtype=jnp.int32), row.shape)
    none = jnp.full((num_rows,), num_tokens, jnp.int32)
    token, rank = (none.at[row].set(which, mode="drop") for which in (token, rank))
    packet = jnp.concatenate(
        [x.at[token].get(mode="fill", fill_value=0), by_rank.at[token, rank].get(mode="fill", fill_value=0)], axis=1
    )
    received = _to_every_rank(jnp.stack([sizes, starts], axis=1), exchange)
    strips = jnp.arange(ranks, dtype=jnp.int32) * num_tokens
    mine, came = RowSlices(starts, sizes), RowSlices(strips, received[:, 0])
    to = jnp.full((ranks,), jax.lax.axis_index(exchange.axes) * num_tokens, jnp.int32)
    packet = _ragged(packet, ranks * num_tokens, num_tokens, send=mine, to=to, receive=came, exchange=exchange)
    own = jnp.sort(row, axis=1)[:, : exchange.max_ranks]
    return packet, DispatchState(own, mine, came, received[:, 1])


def _ragged(
    rows: Array, num_out: int, max_rows: int, *, send: RowSlices, to: Array, receive: RowSlices, exchange: DispatchSpec
) -> Array:
    """Send slices of rows [R,W] of at most `max_rows` rows to all ranks.

    Returns the received rows in an array [num_out,W], zero elsewhere. to: row offset of each slice in the receiver's
    array.
    """
    out = jnp.zeros((num_out, rows.shape[1]), rows.dtype)
    if exchange.platform != "cpu":
        return jax.lax.ragged_all_to_all(
            rows, out, send.offsets, send.sizes, to, receive.sizes, axis_name=exchange.axes
        )
    each = jnp.arange(max_rows, dtype=jnp.int32)

    def places(slices: RowSlices, past: int) -> Array:
        return jnp.where(each < slices.sizes[:, None], slices.offsets[:, None] + each, past)

    strips = rows.at[places(send, len(rows))].get(mode="fill", fill_value=0)
    strips = _to_every_rank(strips, exchange)
    return out.at[places(receive, num_out)].set(strips, mode="drop")

"""Moving tokens to the ranks that hold their experts and the results back. Dropless; called inside shard_map.

Four implementations, one meaning: dispatch gives every token that may need this rank's experts with its combine
weights for them; combine returns, for this rank's own tokens, the sum over all ranks.

- all_to_all: rank-major, static shapes: each rank is sent every token once, however many of its experts the token
  visits, with the weights of its own experts. (N - 1) T rows each way: a shape that must hold the worst case cannot
  send fewer.
- all_gather: tokens gathered with all their weights, results reduce-scattered. As many rows.
- ragged_all_to_all: rank-major too, but a rank is sent only the tokens that visit one of its experts, each once. Shapes
  hold the worst case, so memory is that of the others, what travels is not. XLA:CPU has no such collective: there a
  static one of the same meaning takes its place.
- hierarchical: along the outermost axis first, then along the others: a token goes once to each group of inner ranks
  (a node), and is dealt out inside it. Where the outer axis lies between nodes, (nodes - 1) T rows leave a node in
  place of (N - inner) T; as many as ever arrive. Along one axis alone it is all_to_all. hierarchical_ragged is
  ragged along the others.
"""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, E experts, e experts of this rank, V ranks that a
# token visits at most, W columns that travel.
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.parallel.sharding import Placement

DispatchBackend = Literal["all_to_all", "all_gather", "ragged_all_to_all", "hierarchical", "hierarchical_ragged"]
DISPATCH_BACKENDS: tuple[DispatchBackend, ...] = (
    "all_to_all", "all_gather", "ragged_all_to_all", "hierarchical", "hierarchical_ragged",
)  # fmt: skip
HIERARCHICAL: tuple[DispatchBackend, ...] = ("hierarchical", "hierarchical_ragged")
MAX_RAGGED_GPUS = 8  # ranks that XLA's kernel for GPUs reaches; see docs/decisions/0008


def unsupported_reason(backend: str, placement: Placement) -> str | None:
    """Why a platform or a mesh has no use for a backend; None where it has."""
    peers, levels = placement.ragged_peers(backend), placement.dispatch_levels
    if placement.platform == "gpu" and peers > MAX_RAGGED_GPUS:
        other = "all_to_all" if backend == "ragged_all_to_all" else "hierarchical"
        return f"reaches {MAX_RAGGED_GPUS} GPUs at most, experts are exchanged among {peers}: use {other}"
    if backend in HIERARCHICAL and len(levels) == 1:
        return (
            f"goes along two axes or more, experts are exchanged along one axis, along {levels[0]} alone: share them "
            "out over two, as expert=2,tensor=8 in layout dp-ep does, or use all_to_all"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class DispatchSpec:
    """Who exchanges tokens, and how: num_ranks along mesh axes; max_ranks that a token visits at most.

    platform: of the mesh's devices; "cpu" has no ragged collective.
    """

    axes: tuple[str, ...]
    num_ranks: int
    max_ranks: int
    backend: DispatchBackend
    platform: str

    def levels(self) -> tuple[DispatchSpec, DispatchSpec]:
        """A hierarchical one's: along the first axis of several ranks, and along the rest. Inside shard_map."""
        sizes = {axis: jax.lax.axis_size(axis) for axis in self.axes}
        outer = next(axis for axis in self.axes if sizes[axis] > 1)
        inner = tuple(axis for axis in self.axes if axis != outer)
        first = replace(self, axes=(outer,), num_ranks=sizes[outer], backend="all_to_all")
        ranks = self.num_ranks // sizes[outer]
        backend: DispatchBackend = "ragged_all_to_all" if self.backend == "hierarchical_ragged" else "all_to_all"
        return first, replace(self, axes=inner, num_ranks=ranks, max_ranks=min(ranks, self.max_ranks), backend=backend)


class RowSlices(NamedTuple):
    """Where rows for, or from, each rank stand."""

    offsets: Int[Array, "N"]
    sizes: Int[Array, "N"]


class DispatchState(NamedTuple):
    """What combine has to know of a ragged dispatch: rows [t,V] that each token took, those past the last for none;
    where they and what came stand, and where the others keep what they were sent."""

    rows: Int[Array, "t V"]
    mine: RowSlices
    came: RowSlices
    theirs: Int[Array, "N"]


class DispatchOutput(NamedTuple):
    """Tokens of all ranks and their weights for this rank's experts, and what combine has to know."""

    x: Float[Array, "N*t D"]
    weights: Float[Array, "N*t e"]
    sent: DispatchState | None


def dispatch(x: Float[Array, "t D"], weights: Float[Array, "t E"], exchange: DispatchSpec) -> DispatchOutput:
    """Tokens to the ranks whose experts they may visit. Weights travel beside x; ragged also sends how many come."""
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
    """The sum over ranks of what each computed for this rank's tokens. One collective a level."""
    if exchange.num_ranks == 1:
        return y
    if exchange.backend in HIERARCHICAL:
        outer, inner = exchange.levels()
        return combine(combine(y, sent, inner), None, outer)
    if exchange.backend == "all_gather":
        # Ranks in a dim of their own: tiled ones of many rows XLA:TPU makes an all-reduce of.
        return jax.lax.psum_scatter(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange.axes, scatter_dimension=0)
    if sent is not None:
        rows, num_tokens = sent.rows.size, y.shape[0] // exchange.num_ranks
        back = _ragged(y, rows, num_tokens, send=sent.came, to=sent.theirs, receive=sent.mine, exchange=exchange)
        return _sum_in_order([back.at[each].get(mode="fill", fill_value=0) for each in sent.rows.T])
    return _sum_in_order(_to_every_rank(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange))


def _to_every_rank(parts: Array, exchange: DispatchSpec) -> Array:
    """parts [N, ...]: one for each rank, and then one from each."""
    return jax.lax.all_to_all(parts, exchange.axes, split_axis=0, concat_axis=0, tiled=True)


def _sum_in_order(parts: Any) -> Array:
    """One after another, in float32: how a reduction rounds depends on the number of tokens."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)


def _ragged_dispatch(x: Array, by_rank: Array, exchange: DispatchSpec) -> tuple[Array, DispatchState]:
    """x [t,D] with its weights [t,N,e] where they are not all zero: what came [N*t,W], those of each rank from its own
    strip's first row on."""
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
    """Slices of rows [R,W] to all ranks, `max_rows` rows each at most: what came, in zeros [num_out,W]. to: where they
    begin there."""
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

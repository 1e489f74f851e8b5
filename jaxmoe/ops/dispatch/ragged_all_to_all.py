"""Exchange of tokens by a ragged all-to-all: a rank receives only the tokens that visit one of its experts."""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, e experts of this rank, V maximum number of ranks
# that a token is sent to, W columns of an exchanged row, R rows of a buffer.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmoe.ops.dispatch.all_to_all import sum_in_order, to_every_rank
from jaxmoe.ops.dispatch.spec import DispatchOutput, DispatchSpec, DispatchState, RowSlices


def dispatch(x, weights, exchange: DispatchSpec) -> DispatchOutput:
    """Compute ops.dispatch.dispatch. Row counts are exchanged first."""
    width, ranks = x.shape[1], exchange.num_ranks
    packet, sent = _pack_and_send(x, weights.reshape(-1, ranks, weights.shape[1] // ranks), exchange)
    return DispatchOutput(packet[:, :width], packet[:, width:], sent)


def combine(y, sent: DispatchState, exchange: DispatchSpec):
    """Compute ops.dispatch.combine."""
    rows, num_tokens = sent.rows.size, y.shape[0] // exchange.num_ranks
    back = _send(y, rows, num_tokens, send=sent.came, to=sent.theirs, receive=sent.mine, exchange=exchange)
    return sum_in_order([back.at[each].get(mode="fill", fill_value=0) for each in sent.rows.T])


def _pack_and_send(x: Array, by_rank: Array, exchange: DispatchSpec) -> tuple[Array, DispatchState]:
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
    received = to_every_rank(jnp.stack([sizes, starts], axis=1), exchange)
    strips = jnp.arange(ranks, dtype=jnp.int32) * num_tokens
    mine, came = RowSlices(starts, sizes), RowSlices(strips, received[:, 0])
    to = jnp.full((ranks,), jax.lax.axis_index(exchange.axes) * num_tokens, jnp.int32)
    packet = _send(packet, ranks * num_tokens, num_tokens, send=mine, to=to, receive=came, exchange=exchange)
    own = jnp.sort(row, axis=1)[:, : exchange.max_ranks]
    return packet, DispatchState(own, mine, came, received[:, 1])


def _send(
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
    strips = to_every_rank(strips, exchange)
    return out.at[places(receive, num_out)].set(strips, mode="drop")

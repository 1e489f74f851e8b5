"""Exchange of tokens by an all-gather of all tokens with all their weights, and a reduce-scatter of the results."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.ops.dispatch.spec import DispatchOutput, DispatchSpec


def dispatch(x, weights, exchange: DispatchSpec) -> DispatchOutput:
    """Compute ops.dispatch.dispatch."""
    width, share = x.shape[1], weights.shape[1] // exchange.num_ranks
    packet = jax.lax.all_gather(jnp.concatenate([x, weights], axis=1), exchange.axes, axis=0, tiled=True)
    first = jax.lax.axis_index(exchange.axes) * share
    return DispatchOutput(
        packet[:, :width], jax.lax.dynamic_slice_in_dim(packet[:, width:], first, share, axis=1), None
    )


def combine(y, sent, exchange: DispatchSpec):
    """Compute ops.dispatch.combine."""
    del sent
    # Ranks get their own dim, because XLA:TPU turns a tiled reduce-scatter of many rows into an all-reduce.
    return jax.lax.psum_scatter(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange.axes, scatter_dimension=0)

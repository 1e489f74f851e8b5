"""Exchange of tokens by one all-to-all: every rank receives every token once, with the weights of its own experts."""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, E experts.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmoe.ops.dispatch.spec import DispatchOutput, DispatchSpec


def dispatch(x, weights, exchange: DispatchSpec) -> DispatchOutput:
    """Compute ops.dispatch.dispatch."""
    ranks, width = exchange.num_ranks, x.shape[1]
    by_rank = weights.reshape(-1, ranks, weights.shape[1] // ranks)
    packet = jnp.concatenate([jnp.broadcast_to(x, (ranks, *x.shape)), by_rank.swapaxes(0, 1)], axis=2)
    packet = to_every_rank(packet, exchange).reshape(-1, width + by_rank.shape[2])
    return DispatchOutput(packet[:, :width], packet[:, width:], None)


def combine(y, sent, exchange: DispatchSpec):
    """Compute ops.dispatch.combine."""
    del sent
    return sum_in_order(to_every_rank(y.reshape(exchange.num_ranks, -1, y.shape[1]), exchange))


def to_every_rank(parts: Array, exchange: DispatchSpec) -> Array:
    """Exchange parts [N, ...] by all-to-all: send part n to rank n and return the part received from each rank."""
    return jax.lax.all_to_all(parts, exchange.axes, split_axis=0, concat_axis=0, tiled=True)


def sum_in_order(parts: Any) -> Array:
    """Sum parts one after another in float32. The rounding of an XLA reduction depends on the number of tokens."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)

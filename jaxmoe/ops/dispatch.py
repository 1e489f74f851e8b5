"""Moving tokens to the ranks that hold their experts and the results back. Dropless; called inside shard_map.

Two implementations, one meaning: dispatch gives every token that may need this rank's experts with its combine weights
for them; combine returns, for this rank's own tokens, the sum over all ranks.

- all_to_all: rank-major, static shapes: each rank is sent every token once, with the weights of its own experts.
- all_gather: tokens gathered with all their weights, results reduce-scattered.

Both send (N - 1) T rows each way; a shape that must hold the worst case cannot send fewer.
"""

# Dims: N ranks of the expert axis, t tokens of this rank, D width, E experts, e experts of this rank.
from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DispatchKind = Literal["all_to_all", "all_gather"]
DISPATCH_KINDS: tuple[DispatchKind, ...] = ("all_to_all", "all_gather")


def dispatch(
    x: Float[Array, "t D"],
    weights: Float[Array, "t E"],
    *,
    axis: str | tuple[str, ...],
    num_ranks: int,
    kind: DispatchKind,
) -> tuple[Float[Array, "N*t D"], Float[Array, "N*t e"]]:
    """Tokens of all ranks and their weights for this rank's experts. One collective: weights travel beside x."""
    width, share = x.shape[1], weights.shape[1] // num_ranks
    weights = weights.astype(x.dtype)
    if num_ranks == 1:
        return x, weights
    if kind == "all_gather":
        packet = jax.lax.all_gather(jnp.concatenate([x, weights], axis=1), axis, axis=0, tiled=True)
        mine = jax.lax.axis_index(axis) * share
        return packet[:, :width], jax.lax.dynamic_slice_in_dim(packet[:, width:], mine, share, axis=1)
    by_rank = weights.reshape(-1, num_ranks, share).swapaxes(0, 1)
    packet = jnp.concatenate([jnp.broadcast_to(x, (num_ranks, *x.shape)), by_rank], axis=2)
    packet = jax.lax.all_to_all(packet, axis, split_axis=0, concat_axis=0, tiled=True)
    packet = packet.reshape(-1, width + share)
    return packet[:, :width], packet[:, width:]


def combine(
    y: Float[Array, "N*t D"], *, axis: str | tuple[str, ...], num_ranks: int, kind: DispatchKind
) -> Float[Array, "t D"]:
    """The sum over ranks of what each computed for this rank's tokens. One collective."""
    if num_ranks == 1:
        return y
    if kind == "all_gather":
        return jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
    parts = jax.lax.all_to_all(y.reshape(num_ranks, -1, y.shape[1]), axis, split_axis=0, concat_axis=0, tiled=True)
    total = parts[0].astype(jnp.float32)  # one after another: how a reduction rounds depends on the number of tokens
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(y.dtype)

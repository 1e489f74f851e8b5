"""Routed (token, expert) pairs, sorted by expert."""

# Dims: T tokens, E experts, A = T * min(K, E) maximum number of assignments.
from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ExpertAssignments(NamedTuple):
    """List routed (token, expert) pairs sorted by expert. Rows from ends[-1] on have token index T and weight 0.

    ends: for each expert, the index after its last row.
    """

    tokens: Int[Array, "A"]
    weights: Float[Array, "A"]
    ends: Int[Array, "E"]


def sort_assignments(weights: Float[Array, "T E"], *, top_k: int) -> ExpertAssignments:
    """Return one row per nonzero weight, sorted by expert and then by token. No token may have more than top_k."""
    num_tokens, num_experts = weights.shape
    routed = weights != 0
    ends = jnp.cumsum(jnp.sum(routed, axis=0, dtype=jnp.int32))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    bound = num_tokens * min(top_k, num_experts)
    row = starts + jnp.cumsum(routed, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(routed, row, bound)
    token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row.shape)
    tokens = jnp.full((bound,), num_tokens, jnp.int32).at[row].set(token, mode="drop")
    sorted_weights = jnp.zeros((bound,), weights.dtype).at[row].set(weights, mode="drop")
    return ExpertAssignments(tokens, sorted_weights, ends)

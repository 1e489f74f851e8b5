"""Choosing experts: softmax over all, then the best few."""

# Dims: T tokens, D width, E experts, K experts a token.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseKind, differentiated_as


def route(
    logits: Float[Array, "T E"],
    active: Bool[Array, "T"],
    *,
    top_k: int,
    normalise: bool,
    kind: PointwiseKind = "xla",
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Combine weights (zero for experts not chosen, and for tokens not active) and the probabilities, float32.

    normalise makes the chosen weights sum to 1 (norm_topk_prob). Ties go to the lower expert index.
    """
    return (_native if kind == "native" else _xla)(logits, active, top_k=top_k, normalise=normalise)


def _xla(logits, active, *, top_k, normalise):
    probabilities = jax.nn.softmax(logits, axis=-1)
    chosen, experts = jax.lax.top_k(probabilities, top_k)
    if normalise:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    chosen = jnp.where(active[:, None], chosen, 0.0)
    one_hot = experts[:, :, None] == jnp.arange(logits.shape[1])
    return jnp.sum(jnp.where(one_hot, chosen[:, :, None], 0.0), axis=1), probabilities


@differentiated_as(_xla)
def _native(logits, active, *, top_k, normalise):
    return native.native_route(logits, active, top_k=top_k, normalise=normalise)

"""Training losses: next-token cross entropy and the router's load-balancing loss."""

# Dims: B batch, S length, V vocabulary, E experts, L MoE layers.
from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "B S V"], targets: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """Return the cross entropy -log softmax(logits)[target] of each target, in nats. float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def balance_loss(probabilities: Sequence[Float[Array, "B S E"]], *, top_k: int) -> Float[Array, ""]:
    """Return the load-balancing loss, averaged over layers.

    The loss of a layer is E * sum over experts of (mean choices of the expert per token) * (its mean probability).
    It is top_k at perfect balance and grows up to E as routing collapses. Only the probabilities carry a gradient.
    Raises: ValueError if probabilities is empty.
    Source: Fedus et al., Switch Transformers (2021); choices are counted as in Hugging Face's
    load_balancing_loss_func.
    """
    if not probabilities:
        raise ValueError("probabilities is empty: balance_loss needs router probabilities of at least one MoE layer")
    return jnp.mean(jnp.stack([_layer_balance(layer, top_k) for layer in probabilities]))


def _layer_balance(probabilities: Array, top_k: int) -> Array:
    num_experts = probabilities.shape[-1]
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(probabilities), top_k)
    chosen = jnp.any(experts[..., None] == jnp.arange(num_experts), axis=-2)
    choices_per_token = jnp.mean(chosen, axis=(0, 1), dtype=jnp.float32)
    return num_experts * jnp.sum(choices_per_token * jnp.mean(probabilities, axis=(0, 1)))

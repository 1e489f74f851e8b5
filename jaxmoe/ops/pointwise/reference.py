"""References of row-wise operations: their definitions in float32, rounded once at the end."""

# Dims: B batch, S length, T tokens, E experts, G groups of experts.
from __future__ import annotations

import jax.numpy as jnp


def rms_norm(x, weight, *, eps):
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32**2, axis=-1, keepdims=True)
    return (x32 / jnp.sqrt(mean_square + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def sum_of_squares(x):
    tokens = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    return jnp.einsum("bsd,bsd->bs", tokens, tokens, precision="highest")


def scale_by_rms(x, weight, mean_square, *, eps):
    tokens = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    y = tokens / jnp.sqrt(mean_square + eps)[..., None] * weight.reshape(-1).astype(jnp.float32)
    return y.reshape(x.shape).astype(x.dtype)


def rotate(x, cos, sin):
    """Multiply the complex numbers x[i] + j x[i + R/2] by cos + j sin."""
    half = cos.shape[-1]
    by_token = x.reshape(*x.shape[:2], -1, x.shape[-1]).astype(jnp.float32)
    numbers = (by_token[..., :half] + 1j * by_token[..., half : 2 * half]) * (cos + 1j * sin)[:, :, None]
    y = jnp.concatenate([numbers.real, numbers.imag, by_token[..., 2 * half :]], axis=-1)
    return y.reshape(x.shape).astype(x.dtype)


def gated_unit(gate, up):
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (gate32 / (1 + jnp.exp(-gate32)) * up32).astype(gate.dtype)


def gated_rows(x, gates):
    return (x.astype(jnp.float32) / (1 + jnp.exp(-gates.astype(jnp.float32)))).astype(x.dtype)


def route(logits, valid, bias=None, *, rule):
    """Rank all experts of every token, after the groups that are not among its best."""
    if rule.scoring == "sigmoid":
        scores = 1 / (1 + jnp.exp(-logits))
    else:
        shares = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        scores = shares / jnp.sum(shares, axis=1, keepdims=True)
    choice = logits if rule.top_k_of == "logits" else scores
    choice = choice if bias is None else choice + bias
    if rule.num_groups > 1:
        by_group = choice.reshape(len(choice), rule.num_groups, -1)  # [T,G,E/G]
        best_scores = -jnp.sort(-by_group, axis=2)[:, :, : rule.experts_per_group_score]
        is_best = _ranks(jnp.sum(best_scores, axis=2)) < rule.top_groups
        choice = jnp.where(is_best[:, :, None], by_group, -jnp.inf).reshape(choice.shape)
    weights = jnp.where(_ranks(choice) < rule.top_k, scores, 0)
    if rule.normalize:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + (1e-20 if rule.scoring == "sigmoid" else 0))
    return jnp.where(valid[:, None], weights * rule.scaling, 0), scores


def _ranks(values):
    """Return the rank of each number within its row, 0 for the largest. Ties go to the lower index."""
    return jnp.argsort(jnp.argsort(-values, axis=1, stable=True), axis=1)

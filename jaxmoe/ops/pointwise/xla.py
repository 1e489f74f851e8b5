"""Row-wise operations by XLA, on any platform."""

# Dims: T tokens, E experts.
from __future__ import annotations

import jax
import jax.numpy as jnp

_TINY = 1e-20  # as in DeepSeek-V3: keeps the sum of sigmoids above zero


def rms_norm(x, weight, *, eps):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


def sum_of_squares(x):
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(2, x.ndim)))


def scale_by_rms(x, weight, mean_square, *, eps):
    scale = jax.lax.rsqrt(mean_square + eps).reshape(*mean_square.shape, *(1,) * weight.ndim)
    return weight * (x.astype(jnp.float32) * scale).astype(x.dtype)


def rotate(x, cos, sin):
    spread = (*cos.shape[:2], *(1,) * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(spread), sin.reshape(spread)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def gated_unit(gate, up):
    return jax.nn.silu(gate) * up


def gated_rows(x, gates):
    return jax.nn.sigmoid(gates) * x


def route(logits, valid, bias, *, rule):
    scores = jax.nn.sigmoid(logits) if rule.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = logits if rule.top_k_of == "logits" else scores
    choice = choice if bias is None else choice + bias.astype(jnp.float32)
    choice = choice if rule.num_groups == 1 else _of_best_groups(choice, rule)
    _, experts = jax.lax.top_k(_nan_first(choice), rule.top_k)
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    if rule.normalize:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + (_TINY if rule.scoring == "sigmoid" else 0))
    chosen = jnp.where(valid[:, None], chosen * rule.scaling, 0.0)
    one_hot = experts[:, :, None] == jnp.arange(logits.shape[1])
    return jnp.sum(jnp.where(one_hot, chosen[:, :, None], 0.0), axis=1), scores


def _nan_first(choice):
    """Make every NaN of choice positive. top_k puts negative NaNs last, which would hide them."""
    return jnp.where(jnp.isnan(choice), jnp.nan, choice)


def _of_best_groups(choice, rule):
    """Set choice [T,E] to minus infinity outside each token's best groups."""
    by_group = choice.reshape(len(choice), rule.num_groups, -1)
    score = jnp.sum(
        jax.lax.top_k(_nan_first(by_group), min(rule.experts_per_group_score, by_group.shape[2]))[0], axis=-1
    )
    _, best = jax.lax.top_k(_nan_first(score), rule.top_groups)
    among = jnp.any(best[:, :, None] == jnp.arange(rule.num_groups), axis=1)
    return jnp.where(among[:, :, None], by_group, -jnp.inf).reshape(choice.shape)

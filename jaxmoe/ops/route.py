"""Choosing experts: softmax over all, then the best few, of the best groups alone where there are groups."""

# Dims: T tokens, D width, E experts, K experts a token, G groups of experts, R places for replicas of experts.
from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseKind, differentiated_as


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Group-limited routing: a token chooses among the experts of its top_groups best of num_groups groups of
    neighbouring experts, so that it visits no more nodes than that where each holds whole groups.

    A group is as good as the sum of its `best` most likely experts. Source: DeepSeek-V2 (arXiv 2405.04434), best=1;
    DeepSeek-V3 (arXiv 2412.19437), best=2.
    """

    num_groups: int = 1
    top_groups: int = 1
    best: int = 1


def route(
    logits: Float[Array, "T E"],
    active: Bool[Array, "T"],
    *,
    top_k: int,
    normalise: bool,
    groups: Groups = Groups(),
    kind: PointwiseKind = "xla",
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Combine weights (zero for experts not chosen, and for tokens not active) and the probabilities, float32.

    normalise makes the chosen weights sum to 1 (norm_topk_prob). Ties go to the lower index, of experts and of groups.
    """
    return (_native if kind == "native" else _xla)(logits, active, top_k=top_k, normalise=normalise, groups=groups)


def _xla(logits, active, *, top_k, normalise, groups):
    probabilities = jax.nn.softmax(logits, axis=-1)
    allowed = probabilities if groups.num_groups == 1 else _of_best_groups(probabilities, groups)
    chosen, experts = jax.lax.top_k(allowed, top_k)
    if normalise:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    chosen = jnp.where(active[:, None], chosen, 0.0)
    one_hot = experts[:, :, None] == jnp.arange(logits.shape[1])
    return jnp.sum(jnp.where(one_hot, chosen[:, :, None], 0.0), axis=1), probabilities


def _of_best_groups(probabilities, groups):
    """probabilities [T,E], zero outside each token's best groups."""
    by_group = probabilities.reshape(len(probabilities), groups.num_groups, -1)
    score = jnp.sum(jax.lax.top_k(by_group, min(groups.best, by_group.shape[2]))[0], axis=-1)
    _, best = jax.lax.top_k(score, groups.top_groups)
    among = jnp.any(best[:, :, None] == jnp.arange(groups.num_groups), axis=1)
    return jnp.where(among[:, :, None], by_group, 0.0).reshape(probabilities.shape)


@differentiated_as(_xla)
def _native(logits, active, *, top_k, normalise, groups):
    limits = groups.num_groups, groups.top_groups, groups.best
    return native.native_route(logits, active, top_k=top_k, normalise=normalise, groups=limits)


def mixed(rows: Int[Array, "T"], positions: Int[Array, "T"]) -> Int[Array, "T"]:
    """Numbers that look drawn, by a token's row in its step and its position in its request: neighbours in a prompt,
    and a row from step to step, take other turns. Multipliers as in xxHash (Y. Collet)."""
    bits = rows.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ positions.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    return (bits >> 16).astype(jnp.int32)


def at_places(
    weights: Float[Array, "T E"], placed: Int[Array, "3 R"], turn: Int[Array, "T"]
) -> Float[Array, "T R"]:  # fmt: skip
    """Weights of experts, at the places where they stand; of an expert's replicas, a token visits the one whose turn it
    is.

    placed: the expert at each place (any number of at least E for none), which of its replicas it is, and how many it
    has.
    """
    expert, replica, replicas = placed
    here = weights.at[:, expert].get(mode="fill", fill_value=0)
    return jnp.where(turn[:, None] % jnp.maximum(replicas, 1) == replica, here, 0)

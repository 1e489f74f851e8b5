"""Top-k routing of tokens to experts, optionally limited to the best expert groups."""

# Dims: T tokens, D width, E experts, K experts per token, G groups of experts, R physical experts (replicas).
from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import MoEConfig, Scoring, TopKOf
from jaxmoe.ops import native
from jaxmoe.ops.pointwise import PointwiseBackend, differentiated_as

_TINY = 1e-20  # as in DeepSeek-V3: keeps the sum of sigmoids above zero


@dataclass(frozen=True, kw_only=True)
class RouteRule:
    """Configure how a router chooses experts and computes their weights.

    normalize: whether the weights of the chosen experts are normalized to sum to 1 (norm_topk_prob). scaling: factor
    of the weights, applied after normalization.

    top_k_of: whether the experts with the highest scores or with the highest logits are chosen. They differ because
    scores of different logits may be equal in float32: sigmoids of 17 and more are 1, and softmax gives 0 to logits 104
    and more below the highest.

    num_groups > 1 enables group-limited routing: a token chooses among the experts of its top_groups best groups of
    consecutive experts. If every node holds whole groups, a token visits at most top_groups nodes. The score of a group
    is the sum of its experts_per_group_score best expert scores.
    Source: DeepSeek-V2 (arXiv 2405.04434), experts_per_group_score=1; DeepSeek-V3 (arXiv 2412.19437),
    experts_per_group_score=2.
    """

    top_k: int
    normalize: bool
    scoring: Scoring = "softmax"
    top_k_of: TopKOf = "scores"
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    experts_per_group_score: int = 1

    @classmethod
    def of(cls, moe: MoEConfig) -> RouteRule:
        """Return the routing rule of a model's MoE config."""
        return cls(
            top_k=moe.num_experts_per_tok, normalize=moe.norm_topk_prob, scoring=moe.scoring, top_k_of=moe.top_k_of,
            scaling=moe.routed_scaling, num_groups=moe.num_groups, top_groups=moe.top_groups,
            experts_per_group_score=moe.experts_per_group_score,
        )  # fmt: skip


def route(
    logits: Float[Array, "T E"],
    valid: Bool[Array, "T"],
    bias: Float[Array, "E"] | None = None,
    *,
    rule: RouteRule,
    backend: PointwiseBackend = "xla",
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Return the combine weights and the scores of all experts, both float32.

    Weights are zero for experts that are not chosen and for tokens that are not valid. bias: added to the scores (or
    logits) for the choice of experts only. Ties go to the lower index of experts and of groups.
    """
    return (_native if backend == "native" else _xla)(logits, valid, bias, rule=rule)


def _xla(logits, valid, bias, *, rule):
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


@differentiated_as(_xla)
def _native(logits, valid, bias, *, rule):
    return native.native_route(logits, valid, bias, rule=rule)


def replica_hash(rows: Int[Array, "T"], positions: Int[Array, "T"]) -> Int[Array, "T"]:
    """Hash (row, position) to spread tokens over the replicas of an expert. Multipliers as in xxHash (Y. Collet)."""
    bits = rows.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ positions.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    return (bits >> 16).astype(jnp.int32)


def to_physical(
    weights: Float[Array, "T E"], physical_expert_map: Int[Array, "3 R"], replica_hashes: Int[Array, "T"]
) -> Float[Array, "T R"]:  # fmt: skip
    """Map routing weights from logical to physical experts. A token's hash chooses one replica of each expert.

    physical_expert_map: for each physical expert, its logical expert (E or more if the slot is unused), its replica
    index, and the number of replicas of the logical expert.
    """
    expert, index, num_replicas = physical_expert_map
    here = weights.at[:, expert].get(mode="fill", fill_value=0)
    return jnp.where(replica_hashes[:, None] % jnp.maximum(num_replicas, 1) == index, here, 0)

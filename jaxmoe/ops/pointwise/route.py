"""Top-k routing of tokens to experts, optionally limited to the best expert groups."""

# Dims: T tokens, D width, E experts, K experts per token, G groups of experts, R physical experts (replicas).
from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import MoEConfig, Scoring, TopKOf
from jaxmoe.ops.pointwise.backends import BACKENDS, PointwiseBackend


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
    return BACKENDS[backend].kernels["route"](logits, valid, bias, rule=rule)


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

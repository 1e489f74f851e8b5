"""The Mixture-of-Experts block: one shard_map doing route -> dispatch -> grouped experts -> combine."""

# Dims: b, s, t = this device's batch rows, length, tokens (t = b * s); D width; E experts, e of this rank; F, f ffn.
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig, MoEConfig
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.params import Init, Maker
from jaxmoe.model.rows import Real
from jaxmoe.ops.dispatch import combine, dispatch
from jaxmoe.ops.gate import gated_rows, gated_unit
from jaxmoe.ops.grouped import grouped_swiglu
from jaxmoe.ops.linear import linear
from jaxmoe.ops.route import route
from jaxmoe.ops.stack import At
from jaxmoe.sharding import Placement


class Experts(nnx.Module):
    """SwiGLU weights of all experts (or of the one shared expert, without that dim)."""

    def __init__(self, width: int, ffn: int, num_experts: int, *, make: Maker, init: Init) -> None:
        stack, inside = ({"moe_expert": num_experts}, "moe_ffn") if num_experts else ({}, "ffn")
        self.gate_up = make(init, **stack, width=width, gate_or_up=2, **{inside: ffn})
        self.down = make(init, **stack, **{inside: ffn}, width=width)


class Routed(NamedTuple):
    """Where tokens went: probabilities of the router [B,S,E], and how many tokens of each rank chose each expert
    [r,E]."""

    probabilities: jax.Array
    load: jax.Array


class MoE(nnx.Module):
    """Routed experts, and a shared expert where the config has one."""

    def __init__(
        self,
        config: ModelConfig,
        sizes: ArraySizes,
        placement: Placement,
        kernels: Kernels,
        *,
        make: Maker,
        init: Init,
    ) -> None:
        assert config.moe is not None
        self.moe, self.placement, self.kernels = config.moe, placement, kernels
        width = config.hidden_size
        self.router = make(init, width=width, router_expert=config.moe.num_experts)
        self.experts = Experts(width, sizes.moe_ffn, sizes.moe_experts, make=make, init=init)
        if config.moe.shared_intermediate_size:
            self.shared = Experts(width, sizes.shared_ffn, 0, make=make, init=init)
            self.shared_gate = make(init, width=width, one=1)

    def __call__(self, x: jax.Array, at: At, real: Real) -> tuple[jax.Array, Routed]:
        """x [B,S,D] -> y [B,S,D] and where tokens went, by the weights of layer `at`; tokens that are not real visit
        no expert."""
        place = self.placement
        params = {"router": self.router, "gate_up": self.experts.gate_up, "down": self.experts.down}
        if self.moe.shared_intermediate_size:
            params |= {
                "shared_gate": self.shared_gate,
                "shared_in": self.shared.gate_up,
                "shared_out": self.shared.down,
            }
        arrays = {name: param[...] for name, param in params.items()}
        specs = {name: place.spec(*param.get_metadata()["dims"]) for name, param in params.items()}
        used = [] if real.used is None else [real.used]
        tokens, mask = place.spec("batch", "length", "width"), place.spec("batch", "length")
        y, probabilities, load = place.manual(
            lambda x, active, at, arrays, *used: _on_device(
                x, active, at, used[0][0] if used else None, arrays, moe=self.moe, kernels=self.kernels, place=place
            ),
            in_specs=(tokens, mask, place.spec(), specs, *(place.spec("batch") for _ in used)),
            out_specs=(tokens, place.spec("batch", "length", "router_expert"), place.spec("batch", "router_expert")),
        )(x, real.active, jnp.int32(at), arrays, *used)
        return y, Routed(probabilities, load)


def _on_device(x, active, at, used, arrays, *, moe: MoEConfig, kernels: Kernels, place: Placement):
    """One device's part: its batch rows x [b,s,D], its experts, its columns of each."""
    exchanged, held = place.layout.exchanged, place.layout.held
    ranks = place.size(exchanged)
    x_tD = x.reshape(-1, x.shape[-1])
    weights_tE, probabilities = route(
        linear(x_tD, arrays["router"], at, used, kind=kernels.linear, dtype="float32"),
        active.reshape(-1), top_k=moe.num_experts_per_tok, normalise=moe.norm_topk_prob, kind=kernels.pointwise,
    )  # fmt: skip
    load = jnp.sum(weights_tE != 0, axis=0, dtype=jnp.int32)[None]
    share, others = arrays["gate_up"].shape[1], place.size(held)
    weights_tE = jnp.pad(weights_tE, ((0, 0), (0, share * ranks * others - moe.num_experts)))
    if others > 1:  # of the ranks that have the same tokens, each looks after its own experts
        by_rank = weights_tE.reshape(-1, ranks, others, share)
        weights_tE = jax.lax.dynamic_index_in_dim(by_rank, jax.lax.axis_index(held), axis=2, keepdims=False)
        weights_tE = weights_tE.reshape(-1, ranks * share)
    x_TD, weights_Te = dispatch(x_tD, weights_tE, axis=exchanged, num_ranks=ranks, kind=kernels.dispatch)
    y_TD = grouped_swiglu(
        x_TD, weights_Te, arrays["gate_up"], arrays["down"], at, top_k=moe.num_experts_per_tok, kind=kernels.grouped
    )
    y_tD = combine(y_TD, axis=exchanged, num_ranks=ranks, kind=kernels.dispatch)
    if moe.shared_intermediate_size:
        y_tD = y_tD + _shared_expert(x_tD, at, used, arrays, kernels)
    if place.size(place.held_experts()) > 1:
        y_tD = jax.lax.psum(y_tD, place.held_experts())
    return y_tD.reshape(x.shape), probabilities.reshape(*x.shape[:2], -1), load


def _shared_expert(x, at, used, arrays, kernels: Kernels):
    """This device's columns of the expert every token visits, times its sigmoid gate."""
    kind = kernels.linear
    layers, width, _, ffn = arrays["shared_in"].shape
    both = linear(x, arrays["shared_in"].reshape(layers, width, 2 * ffn), at, used, kind=kind)
    hidden = gated_unit(both.reshape(-1, 2, ffn), kind=kernels.pointwise)
    y = linear(hidden, arrays["shared_out"], at, used, kind=kind)
    return gated_rows(y, linear(x, arrays["shared_gate"], at, used, kind=kind), kind=kernels.pointwise)

"""The Mixture-of-Experts block: one shard_map over route -> dispatch -> grouped experts -> combine."""

# Dims: b, s, t = this device's batch rows, length, tokens (t = b * s); D width; E experts, e of this rank; F, f ffn;
# R physical experts.
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig, MoEConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.parameters import moe_parameters
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.params import Matrix, ParamFactory, dims_of, weights_of
from jaxmoe.model.project import all_gather_rows, reduce_or_scatter
from jaxmoe.model.rows import TokenMask, hidden_dims
from jaxmoe.ops.dispatch import DispatchSpec, combine, dispatch, unsupported_reason
from jaxmoe.ops.grouped_matmul import grouped_swiglu
from jaxmoe.ops.linear import linear
from jaxmoe.ops.pointwise import RouteRule, gated_rows, gated_unit, replica_hash, route, to_physical
from jaxmoe.ops.stack import LayerIndex, layer_of
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim


class RoutedExperts(nnx.Module):
    """Hold the SwiGLU weights of all routed experts.

    Whole matrices are consecutive, so that each can be read in place.
    """

    gate_up: Matrix
    down: Matrix
    gate_up_bias: nnx.Param


class SharedExpert(nnx.Module):
    """Hold the SwiGLU weights of the expert that every token visits, as in a dense layer."""

    gate: Matrix
    up: Matrix
    down: Matrix


class RouterOutput(NamedTuple):
    """Hold the router's results.

    probabilities [B,S,E]: router scores. tokens_per_expert [n,R]: number of tokens that each of the n routing ranks
    routes to each of the R physical experts.
    """

    probabilities: jax.Array
    tokens_per_expert: jax.Array


class MoE(nnx.Module):
    """Compute routed experts, and a shared expert if the config has one.

    Parameters of options that the config lacks do not exist.
    """

    router: nnx.Param
    router_bias: nnx.Param
    selection_bias: nnx.Param
    down_bias: nnx.Param
    physical_expert_map: nnx.Param
    shared_gate: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        sizes: ArraySizes,
        placement: MeshPlacement,
        kernels: KernelConfig,
        *,
        params: ParamFactory,
    ) -> None:
        assert config.moe is not None
        self.moe, self.placement, self.kernels = config.moe, placement, kernels
        if why := unsupported_reason(kernels.dispatch, placement):
            raise ConfigError(f"dispatch={kernels.dispatch} {why}")
        self.experts = RoutedExperts()
        if self.moe.shared_intermediate_size:
            self.shared = SharedExpert()
        maps_experts = placement.redundant_experts is not None
        params.create(self, moe_parameters(config, sizes, maps_experts=maps_experts), within="moe")

    def __call__(
        self, x: jax.Array, layer: LayerIndex, token_mask: TokenMask, token_dim: TokenDim
    ) -> tuple[jax.Array, RouterOutput]:
        """Apply the block with the weights of `layer`: x [B,S,D] -> [B,S,D], and the router output.

        Padding tokens visit no expert. token_dim: logical dim of the token rows of x.
        """
        placement = self.placement
        params = self._params()
        arrays = {name: weights_of(param) for name, param in params.items()}
        specs = {name: placement.spec(*dims_of(param)) for name, param in params.items()}
        num_valid = [] if token_mask.num_valid is None else [token_mask.num_valid]
        routed = placement.routed(token_dim)
        y, probabilities, tokens_per_expert = placement.shard_map(
            lambda x, token_mask, layer, arrays, *num_valid: _on_device(
                x, token_mask, layer, num_valid[0][0] if num_valid else None, arrays,
                moe=self.moe, kernels=self.kernels, placement=placement, token_dim=token_dim,
            ),
            in_specs=(
                placement.spec(*hidden_dims(token_dim)), (placement.spec(routed, "length"),) * 2,
                placement.spec(), specs,
                *(placement.spec("token") for _ in num_valid),
            ),
            out_specs=(
                placement.spec(*hidden_dims(token_dim)), placement.spec(routed, "length", "router_expert"),
                placement.spec(routed, "router_expert"),
            ),
        )(x, (token_mask.valid, token_mask.positions), jnp.int32(layer), arrays, *num_valid)  # fmt: skip
        return y, RouterOutput(probabilities, tokens_per_expert)

    def _params(self) -> dict[str, Matrix]:
        """Return the parameters that _on_device receives a shard of, by name."""
        params: dict[str, Matrix] = {"router": self.router, "gate_up": self.experts.gate_up, "down": self.experts.down}
        if self.moe.biases:
            params |= {"gate_up_bias": self.experts.gate_up_bias, "down_bias": self.down_bias}
        if self.moe.shared_intermediate_size:
            params |= {f"shared/{name}": getattr(self.shared, name) for name in ("gate", "up", "down")}
        names = {
            "router_bias": self.moe.router_bias,
            "selection_bias": self.moe.selection_bias,
            "shared_gate": self.moe.shared_gate,
            "physical_expert_map": self.placement.redundant_experts is not None,
        }
        return params | {name: getattr(self, name) for name, there in names.items() if there}


def _on_device(
    x,
    token_mask,
    layer,
    num_valid,
    arrays,
    *,
    moe: MoEConfig,
    kernels: KernelConfig,
    placement: MeshPlacement,
    token_dim: TokenDim,
):
    """Compute one device's part: its batch rows x [b,s,D], its experts, and its columns of each."""
    x_bD = x.reshape(-1, x.shape[-1])
    gather_axes, sequence_axes = placement.ep_gather_axes(token_dim), placement.sequence_gather_axes(token_dim)
    left = tuple(axis for axis in placement.expert_reduce_axes(token_dim) if axis not in gather_axes)
    x_tD = all_gather_rows(x_bD, gather_axes)
    # num_valid counts tokens of shards inside layers. It does not apply to sequence-sharded strips.
    own_num_valid = num_valid if placement.routed(token_dim) == "token" else None
    y, probabilities, tokens_per_expert = _routed_experts(
        x_tD, token_mask, layer, own_num_valid, arrays, moe, kernels, placement, token_dim
    )
    shared = partial(_shared_expert, layer=layer, num_valid=num_valid, arrays=arrays, kernels=kernels)
    if moe.shared_intermediate_size and sequence_axes == gather_axes:
        y = y + shared(x_tD)
    y = reduce_or_scatter(y, (), gather_axes)
    if moe.shared_intermediate_size and sequence_axes != gather_axes:
        y = y + reduce_or_scatter(shared(all_gather_rows(x_bD, sequence_axes)), (), sequence_axes)
    y = reduce_or_scatter(y, left, ())  # axes of split that shard no tokens, for routed and shared experts
    return y.reshape(x.shape), probabilities.reshape(*token_mask[0].shape, -1), tokens_per_expert


def _routed_experts(
    x_tD, token_mask, layer, num_valid, arrays, moe: MoEConfig, kernels: KernelConfig, placement: MeshPlacement,
    token_dim: TokenDim
):  # fmt: skip
    """Route tokens x_tD and return their sum over routed experts, the router scores and the tokens per expert.

    The experts are this device's and those of the ranks it exchanges tokens with.
    """
    valid, positions = (part.reshape(-1) for part in token_mask)
    exchange_axes, replicated_axes = placement.ep_exchange_axes(token_dim), placement.ep_replicated_axes(token_dim)
    ranks, others = placement.size(exchange_axes), placement.size(replicated_axes)
    logits = linear(x_tD, arrays["router"], layer, num_valid, backend=kernels.linear, dtype="float32")
    if moe.router_bias:
        logits = logits + layer_of(arrays["router_bias"], layer)
    bias = layer_of(arrays["selection_bias"], layer) if moe.selection_bias else None
    weights_tE, probabilities = route(logits, valid, bias, rule=RouteRule.of(moe), backend=kernels.pointwise)
    chosen_tE = weights_tE
    if moe.apply_router_weight_on_input:
        x_tD = (x_tD * jnp.sum(weights_tE, axis=1, keepdims=True)).astype(x_tD.dtype)
        weights_tE = (weights_tE != 0).astype(weights_tE.dtype)
    share = jax.tree.leaves(arrays["gate_up"])[0].shape[1]
    if "physical_expert_map" in arrays:
        axes = placement.axes(placement.routed(token_dim))
        rows = jnp.arange(len(x_tD)) + (jax.lax.axis_index(axes) * len(x_tD) if axes else 0)
        weights_tE = to_physical(
            weights_tE, layer_of(arrays["physical_expert_map"], layer), replica_hash(rows, positions)
        )
    else:
        weights_tE = jnp.pad(weights_tE, ((0, 0), (0, share * ranks * others - moe.num_experts)))
    tokens_per_expert = jnp.sum(weights_tE != 0, axis=0, dtype=jnp.int32)[None]
    if others > 1:  # each of the ranks with the same tokens computes its own experts
        by_rank = weights_tE.reshape(-1, ranks, others, share)
        weights_tE = jax.lax.dynamic_index_in_dim(by_rank, jax.lax.axis_index(replicated_axes), axis=2, keepdims=False)
        weights_tE = weights_tE.reshape(-1, ranks * share)
    exchange = DispatchSpec(
        axes=exchange_axes, num_ranks=ranks, max_ranks=min(ranks, moe.num_experts_per_tok), backend=kernels.dispatch,
        platform=placement.platform,
    )  # fmt: skip
    x_TD, weights_Te, sent = dispatch(x_tD, weights_tE, exchange)
    y_TD = grouped_swiglu(
        x_TD, weights_Te, arrays["gate_up"], arrays["down"], layer, arrays.get("gate_up_bias"),
        top_k=moe.num_experts_per_tok, clamp=moe.clamp, backend=kernels.grouped,
    )  # fmt: skip
    y_tD = combine(y_TD, sent, exchange)
    if moe.biases:
        y_tD = y_tD + _down_biases(chosen_tE, layer_of(arrays["down_bias"], layer), placement, token_dim).astype(
            y_tD.dtype
        )
    return y_tD, probabilities, tokens_per_expert


def _down_biases(weights_tE, bias_ED, placement: MeshPlacement, token_dim: TokenDim):
    """Return the weighted sum of the down biases of each token's experts.

    Among ranks whose results are summed, only the first contributes.
    """
    summed = {*placement.expert_reduce_axes(token_dim), *placement.ep_gather_axes(token_dim)}
    first = math.prod([jax.lax.axis_index(axis) == 0 for axis in summed], start=jnp.float32(1))
    return jnp.dot(weights_tE * first, bias_ED.astype(jnp.float32))


def _shared_expert(x, *, layer, num_valid, arrays, kernels: KernelConfig):
    """Compute this device's columns of the shared expert, times its sigmoid gate if it has one."""
    backend = kernels.linear
    gate, up = (linear(x, arrays[f"shared/{name}"], layer, num_valid, backend=backend) for name in ("gate", "up"))
    y = linear(
        gated_unit(gate, up, backend=kernels.pointwise), arrays["shared/down"], layer, num_valid, backend=backend
    )
    if "shared_gate" not in arrays:
        return y
    return gated_rows(y, linear(x, arrays["shared_gate"], layer, num_valid, backend=backend), backend=kernels.pointwise)

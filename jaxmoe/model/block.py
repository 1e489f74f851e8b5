"""One decoder layer: norm, attention, norm, MLP or MoE, with residuals."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import norm_parameters
from jaxmoe.model.attention import ForwardContext, GroupedQueryAttention
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.latent import LatentAttention
from jaxmoe.model.mlp import MLP
from jaxmoe.model.moe import MoE, RouterOutput
from jaxmoe.model.params import ParamFactory, at_layer
from jaxmoe.model.rows import hidden_dims, rms_norm
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement


class DecoderLayer(nnx.Module):
    """Hold one decoder layer, or the stacked weights of identical layers starting at index `layer`."""

    input_layernorm: nnx.Param
    post_attention_layernorm: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        sizes: ArraySizes,
        placement: MeshPlacement,
        kernels: KernelConfig,
        layer: int,
        *,
        params: ParamFactory,
    ) -> None:
        self.eps, self.sparse = config.rms_norm_eps, config.moe_layers[layer]
        self.placement, self.kernels = placement, kernels
        params.create(self, norm_parameters(config))
        attention = GroupedQueryAttention if config.mla is None else LatentAttention
        self.attention = attention(config, sizes, placement, kernels, layer, params=params)
        if self.sparse:
            self.moe = MoE(config, sizes, placement, kernels, params=params)
        else:
            self.mlp = MLP(config, sizes, placement, kernels, params=params)

    def __call__(
        self, x: jax.Array, layer: LayerIndex, context: ForwardContext, kv_cache: Any
    ) -> tuple[jax.Array, Any, RouterOutput | None]:
        """Apply the layer with the weights at index `layer`: x [B,S,D] -> [B,S,D].

        Also return the new KV cache, and the router output of an MoE layer.
        """
        token_dim = self.placement.token_dim(x.shape[0])
        h = self._rms_norm(x, self.input_layernorm, layer)
        y, kv_cache = self.attention(h, layer, context, kv_cache, token_dim)
        x = x + y
        h = self._rms_norm(x, self.post_attention_layernorm, layer)
        if self.sparse:
            y, routed = self.moe(h, layer, context.token_mask, token_dim)
            return x + y, kv_cache, routed
        return x + self.mlp(h, layer, context.token_mask.num_valid, token_dim), kv_cache, None

    def _rms_norm(self, x: jax.Array, weight: nnx.Param, layer: LayerIndex) -> jax.Array:
        dims = hidden_dims(self.placement.token_dim(x.shape[0]))
        return rms_norm(x, at_layer(weight, layer), dims, self.placement, self.kernels.pointwise, eps=self.eps)

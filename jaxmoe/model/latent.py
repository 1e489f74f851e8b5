"""Multi-head latent attention (MLA): all heads share one cached latent per token.

With a KV cache, the up-projections from the latent are absorbed. Queries are projected down to the latent, and the
attention output is projected up to values. So no head's keys or values are computed from the cache. Dense prefill
without a cache computes every head's keys and values once per token. Both give the same result. Source: DeepSeek-V2
(arXiv 2405.04434).
"""

# Dims: B batch, S length, D width, K head slots, G heads per slot, N dims of a head without RoPE, P dims with RoPE,
# R latent, V value.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import attention_parameters
from jaxmoe.model.attention import ForwardContext, layer_mask_spec
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.params import Matrix, ParamFactory, at_layer
from jaxmoe.model.project import all_gather_tokens, project
from jaxmoe.model.rows import QUERY_DIMS, apply_rope, rms_norm
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim

_EPS = 1e-6  # for both latent norms; rms_norm_eps of the config applies to the other norms
_LATENT = ("token", "length", "latent")


class LatentAttention(nnx.Module):
    """Compute latent attention for one layer, or for stacked identical layers starting at index `layer`.

    Every head slot caches the same latent. Parameters of options that the config lacks do not exist.
    """

    kv_down: Matrix
    kv_norm: nnx.Param
    q_down: Matrix
    q_norm: nnx.Param
    q: Matrix
    key_up: nnx.Param
    value_up: nnx.Param
    out: Matrix
    out_bias: nnx.Param

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
        assert config.mla is not None
        self.config, self.mla, self.placement, self.kernels, self.layer = config, config.mla, placement, kernels, layer
        params.create(self, attention_parameters(config, sizes), within="attention")

    def __call__(
        self, x: jax.Array, layer: LayerIndex, context: ForwardContext, kv_cache: Any, token_dim: TokenDim
    ) -> tuple[jax.Array, Any]:
        """Apply attention with the weights of `layer`: x [B,S,D] -> [B,S,D], and the new KV cache.

        token_dim: see project.
        """
        placement, kernels, mla = self.placement, self.kernels, self.mla
        num_valid, rotary = context.token_mask.num_valid, (context.cos, context.sin)
        x = all_gather_tokens(x, placement, token_dim)
        down = project(x, self.kv_down, placement, kernels.linear, layer, num_valid)
        latent = self._rms_norm(down[..., : mla.kv_lora_rank], self.kv_norm, layer)
        turned = apply_rope(down[..., mla.kv_lora_rank :], *rotary, _LATENT, placement, kernels.pointwise)
        if mla.q_lora_rank is not None:
            x = self._rms_norm(project(x, self.q_down, placement, kernels.linear, layer, num_valid), self.q_norm, layer)
        q = project(x, self.q, placement, kernels.linear, layer, num_valid)
        plain, q_turned = q[..., : mla.qk_nope_head_dim], q[..., mla.qk_nope_head_dim :]
        q_turned = apply_rope(q_turned, *rotary, QUERY_DIMS, placement, kernels.pointwise)
        over = self._over_latents if context.attention_backend.uses_kv_cache else self._over_heads
        mixed, kv_cache = over(plain, q_turned, latent, turned, layer, context, kv_cache)
        y = project(mixed, self.out, placement, kernels.linear, layer, num_valid, over=3, token_dim=token_dim)
        return (y + at_layer(self.out_bias, layer) if self.config.out_bias else y), kv_cache

    def _rms_norm(self, x: jax.Array, weight: nnx.Param, layer: LayerIndex) -> jax.Array:
        return rms_norm(x, at_layer(weight, layer), _LATENT, self.placement, self.kernels.pointwise, eps=_EPS)

    def _over_latents(self, plain, q_turned, latent, turned, layer: LayerIndex, context: ForwardContext, kv_cache: Any):
        """Attend with queries [B,S,K,G,N] and [B,S,K,G,P] to cached latents [B,S,R] and keys [B,S,P].

        Return [B,S,K,G,V] and the new KV cache.
        """
        placement = self.placement
        lowered = jnp.einsum("bskgn,kgnr->bskgr", plain, at_layer(self.key_up, layer))
        q = placement.constrain(jnp.concatenate([lowered, q_turned], axis=-1), *QUERY_DIMS)
        key = jnp.concatenate([latent, turned], axis=-1)[:, :, None]
        key = jnp.broadcast_to(key, (*key.shape[:2], q.shape[2], key.shape[3]))
        mixed, kv_cache = context.attention_backend(
            kv_cache, layer, q, key, None, mask_spec=layer_mask_spec(self.config, self.layer), sinks=None,
            placement=placement,
            value_dim=self.mla.kv_lora_rank,
        )  # fmt: skip
        values = jnp.einsum("bskgr,kgrv->bskgv", mixed, at_layer(self.value_up, layer))
        return placement.constrain(values, *QUERY_DIMS), kv_cache

    def _over_heads(self, plain, q_turned, latent, turned, layer: LayerIndex, context: ForwardContext, kv_cache: Any):
        """Attend as _over_latents does, with keys and values of every head."""
        placement = self.placement
        keys = jnp.einsum("bsr,kgnr->bskgn", latent, at_layer(self.key_up, layer))
        values = jnp.einsum("bsr,kgrv->bskgv", latent, at_layer(self.value_up, layer))
        turned = jnp.broadcast_to(turned[:, :, None, None], (*keys.shape[:4], turned.shape[-1]))
        q, k = (jnp.concatenate(pair, axis=-1) for pair in ((plain, q_turned), (keys, turned)))
        q, k, values = (placement.constrain(part, *QUERY_DIMS) for part in (q, k, values))

        def by_head(part: jax.Array) -> jax.Array:
            return part.reshape(*part.shape[:2], -1, part.shape[-1])

        mixed, kv_cache = context.attention_backend(
            kv_cache, layer, by_head(q)[:, :, :, None], by_head(k), by_head(values), placement=placement, sinks=None,
            mask_spec=layer_mask_spec(self.config, self.layer),
        )  # fmt: skip
        return mixed.reshape(values.shape), kv_cache

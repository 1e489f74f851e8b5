"""Grouped-query attention with optional biases, QK norm, clipping and rotary embedding."""

# Dims: B batch, S length, D width, K key/value head slots, G query heads a slot, H head dim.
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import attention_parameters
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.params import Matrix, ParamFactory, at_layer
from jaxmoe.model.project import project
from jaxmoe.model.rows import KEY_DIMS, QUERY_DIMS, TokenMask, apply_rope, mean_squares, qk_norm, rms_norm
from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim


class AttentionBackend(Protocol):
    """Compute attention of queries over keys and values, within a prompt or over a growing KV cache.

    uses_kv_cache: whether it reads and writes a KV cache.
    """

    uses_kv_cache: bool

    def __call__(
        self, kv_cache: Any, layer: LayerIndex, q: jax.Array, k: jax.Array, v: jax.Array | None, *, mask_spec: MaskSpec,
        sinks: jax.Array | None, placement: MeshPlacement, value_dim: int | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Attend with q [B,S,K,G,H] to kv_cache and to the new tokens' k [B,S,K,H] and v [B,S,K,V].

        Return the output [B,S,K,G,V] and the new kv_cache.

        kv_cache: keys and values of earlier tokens, stacked over the layers of this block. layer: index into that
        stack. sinks [K,G]: logits that take part in the softmax and have no value. value_dim: V, if values are the
        first numbers of keys and v is None.
        """
        ...


class LayerInputs(NamedTuple):
    """Hold per-token metadata that every layer receives.

    positions [B,S]. valid [B,S]: False for padding, which no expert computes. attention_backend: how the tokens attend.
    """

    positions: jax.Array
    valid: jax.Array
    attention_backend: AttentionBackend


class StepInputs(Protocol):
    """Hold the inputs of all tokens of a step: a tree of arrays that every pipeline stage receives."""

    def part(self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True) -> LayerInputs:
        """Return the layer inputs of one of `of` micro-batches at one decode step.

        All tokens are masked unless slot_valid.
        """
        ...


class ForwardContext(NamedTuple):
    """Hold metadata shared by all layers of one forward pass.

    cos, sin [B,S,R/2]: rotary values of the R rotated dims of a head. token_mask: valid tokens. attention_backend: how
    they attend.
    """

    cos: jax.Array
    sin: jax.Array
    token_mask: TokenMask
    attention_backend: AttentionBackend


def layer_mask_spec(config: ModelConfig, layer: int) -> MaskSpec:
    """Return the attention mask of a layer."""
    return MaskSpec(scale=config.scale, window=config.sliding_windows[layer], chunk=config.chunk(layer))


class GroupedQueryAttention(nnx.Module):
    """Compute grouped-query attention for one layer, or for stacked identical layers starting at index `layer`.

    Query, key and value of a head slot are adjacent in one matrix. Parameters of options that the config lacks do not
    exist.
    """

    qkv: Matrix
    out: Matrix
    qkv_bias: nnx.Param
    out_bias: nnx.Param
    sinks: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param

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
        self.config, self.placement, self.kernels, self.layer = config, placement, kernels, layer
        self.group = sizes.group_slots
        if config.qk_norm == "full":
            self.kv_copies = sizes.kv_copies
        params.create(self, attention_parameters(config, sizes), within="attention")

    def __call__(
        self, x: jax.Array, layer: LayerIndex, context: ForwardContext, kv_cache: Any, token_dim: TokenDim
    ) -> tuple[jax.Array, Any]:
        """Apply attention with the weights of `layer`: x [B,S,D] -> [B,S,D], and the new KV cache.

        token_dim: see project.
        """
        config, placement, num_valid = self.config, self.placement, context.token_mask.num_valid
        qkv = project(x, self.qkv, placement, self.kernels.linear, layer, num_valid, token_dim=token_dim)
        if config.qkv_bias:
            qkv = qkv + at_layer(self.qkv_bias, layer)
        q, k, v = qkv[..., : self.group, :], qkv[..., self.group, :], qkv[..., self.group + 1, :]
        q, k = self._qk_norm(q, k, layer)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        q, k = self._apply_rope(q, k, context)
        sinks = at_layer(self.sinks, layer) if config.sinks else None
        mixed, kv_cache = context.attention_backend(
            kv_cache, layer, q, k, v, mask_spec=layer_mask_spec(config, self.layer), sinks=sinks, placement=placement
        )
        y = project(mixed, self.out, placement, self.kernels.linear, layer, num_valid, over=3, token_dim=token_dim)
        return (y + at_layer(self.out_bias, layer) if config.out_bias else y), kv_cache

    def _apply_rope(self, q: jax.Array, k: jax.Array, context: ForwardContext) -> tuple[jax.Array, jax.Array]:
        """Apply RoPE to query and key. In layers without RoPE, scale the query by its position if configured."""
        config, placement, backend = self.config, self.placement, self.kernels.pointwise
        if config.has_rope(self.layer):
            rotary = context.cos, context.sin
            return apply_rope(q, *rotary, QUERY_DIMS, placement, backend), apply_rope(
                k, *rotary, KEY_DIMS, placement, backend
            )
        if config.attn_temperature_tuning is not None:
            scale, floor = config.attn_temperature_tuning
            stretch = 1 + scale * jnp.log1p((context.token_mask.positions + 1) // floor)
            q = (q * stretch[:, :, None, None, None]).astype(q.dtype)
        return q, k

    def _qk_norm(self, q: jax.Array, k: jax.Array, layer: LayerIndex) -> tuple[jax.Array, jax.Array]:
        """Normalize query and key over each head, or over all heads at once.

        Under tensor parallelism, norms over all heads need one small all-reduce for both.
        """
        config = self.config
        if config.qk_norm == "head" or (config.qk_norm == "unit" and config.has_rope(self.layer)):
            by, eps = (self.placement, self.kernels.pointwise), config.rms_norm_eps
            plain = jnp.ones(config.head_dim, q.dtype)
            with_weights = config.qk_norm == "head"
            q = rms_norm(q, at_layer(self.q_norm, layer) if with_weights else plain, QUERY_DIMS, *by, eps=eps)
            return q, rms_norm(k, at_layer(self.k_norm, layer) if with_weights else plain, KEY_DIMS, *by, eps=eps)
        if config.qk_norm == "full":
            placement, backend, eps = self.placement, self.kernels.pointwise, config.rms_norm_eps
            mean = mean_squares(q, k, self._columns(), placement, backend)
            q = qk_norm(q, at_layer(self.q_norm, layer), mean[..., 0], QUERY_DIMS, placement, backend, eps=eps)
            k = qk_norm(k, at_layer(self.k_norm, layer), mean[..., 1], KEY_DIMS, placement, backend, eps=eps)
        return q, k

    def _columns(self) -> tuple[int, int]:
        """Return the number of columns of a token's query and key, counting every replica of a key head."""
        config = self.config
        copies = config.num_key_value_heads * self.kv_copies
        return config.num_attention_heads * config.head_dim, copies * config.head_dim

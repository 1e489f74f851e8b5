"""Grouped-query attention with optional biases, norms over query and key, clipping, rotary embedding."""

# Dims: B batch, S length, D width, K key/value head slots, G query heads a slot, H head dim.
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.params import Init, Maker, at_layer, ones, zeros
from jaxmoe.model.project import project
from jaxmoe.model.rows import KEY_DIMS, QUERY_DIMS, mean_squares, normed, rotated, scaled
from jaxmoe.ops.stack import At
from jaxmoe.sharding import Placement, TokenDim


class Attend(Protocol):
    """How queries meet keys and values: within a prompt, or against a cache that grows."""

    def __call__(
        self, kept: Any, at: At, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None, place: Placement
    ) -> tuple[jax.Array, Any]:
        """q [B,S,K,G,H], k and v [B,S,K,H] of the new tokens -> [B,S,K,G,H], and what is kept now.

        kept: what there is of earlier tokens, of all layers of this block of a segment; at: which of them this is.
        """
        ...


class Told(NamedTuple):
    """What layers are told of the tokens they get: positions [B,S]; active [B,S], False for padding, which visits no
    expert; how they attend."""

    positions: jax.Array
    active: jax.Array
    attend: Attend


class Work(Protocol):
    """All tokens of a step: a tree of arrays, which every stage of a pipeline is told."""

    def part(self, micro_batch: Any, of: int, turn: Any = 0, busy: Any = True) -> Told:
        """What is to be known of one of `of` even parts, in one turn. Unless busy none of its tokens is real."""
        ...


class Attention(nnx.Module):
    """One attention block; layer: the first that it holds.

    Query, key and value of a head slot lie side by side in one matrix.
    """

    def __init__(
        self,
        config: ModelConfig,
        sizes: ArraySizes,
        placement: Placement,
        kernels: Kernels,
        layer: int,
        *,
        make: Maker,
        init: Init,
    ) -> None:
        self.config, self.placement, self.kernels, self.layer = config, placement, kernels, layer
        self.group = sizes.group_slots
        heads = dict(kv_head=sizes.kv_slots, head_slot=sizes.group_slots + 2, head_dim=config.head_dim)
        query = dict(kv_head=sizes.kv_slots, head_slot=sizes.group_slots, head_dim=config.head_dim)
        self.qkv = make.matrix("attention/qkv", init, width=config.hidden_size, **heads)
        self.out = make.matrix("attention/out", init, over=3, **query, width=config.hidden_size)
        if config.qkv_bias:
            self.qkv_bias = make(zeros, **heads)
        if config.out_bias:
            self.out_bias = make(zeros, width=config.hidden_size)
        if config.qk_norm == "head":
            self.q_norm = make(ones, head_dim=config.head_dim)
            self.k_norm = make(ones, head_dim=config.head_dim)
        if config.qk_norm == "full":
            self.q_norm = make(ones, **query)
            self.k_norm = make(ones, kv_head=sizes.kv_slots, head_dim=config.head_dim)
            self.kv_copies = sizes.kv_copies

    def __call__(
        self, x: jax.Array, at: At, cos: jax.Array, sin: jax.Array, used: jax.Array | None, attend: Attend, kept: Any,
        lead: TokenDim,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """x [B,S,D] -> [B,S,D] by the weights of layer `at`, and what attend keeps. used, lead: see project."""
        config, place = self.config, self.placement
        qkv = project(x, self.qkv, place, self.kernels.linear, at, used, lead=lead)
        if config.qkv_bias:
            qkv = qkv + at_layer(self.qkv_bias, at)
        q, k, v = qkv[..., : self.group, :], qkv[..., self.group, :], qkv[..., self.group + 1, :]
        q, k = self._normed(q, k, at)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        kind = self.kernels.pointwise
        q, k = rotated(q, cos, sin, QUERY_DIMS, place, kind), rotated(k, cos, sin, KEY_DIMS, place, kind)
        mixed, kept = attend(kept, at, q, k, v, window=config.sliding_windows[self.layer], place=place)
        y = project(mixed, self.out, place, self.kernels.linear, at, used, over=3, lead=lead)
        return (y + at_layer(self.out_bias, at) if config.out_bias else y), kept

    def _normed(self, q: jax.Array, k: jax.Array, at: At) -> tuple[jax.Array, jax.Array]:
        """Norms over each head, or over all heads at once (one small all-reduce for both under tensor parallelism)."""
        config = self.config
        if config.qk_norm == "head":
            by, eps = (self.placement, self.kernels.pointwise), config.rms_norm_eps
            q = normed(q, at_layer(self.q_norm, at), QUERY_DIMS, *by, eps=eps)
            return q, normed(k, at_layer(self.k_norm, at), KEY_DIMS, *by, eps=eps)
        if config.qk_norm == "full":
            place, kind, eps = self.placement, self.kernels.pointwise, config.rms_norm_eps
            mean = mean_squares(q, k, self._columns(), place, kind)
            q = scaled(q, at_layer(self.q_norm, at), mean[..., 0], QUERY_DIMS, place, kind, eps=eps)
            k = scaled(k, at_layer(self.k_norm, at), mean[..., 1], KEY_DIMS, place, kind, eps=eps)
        return q, k

    def _columns(self) -> tuple[int, int]:
        """Numbers of a token's query and key, as often as each is held."""
        config = self.config
        copies = config.num_key_value_heads * self.kv_copies
        return config.num_attention_heads * config.head_dim, copies * config.head_dim

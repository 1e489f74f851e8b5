"""The ways queries meet keys: within a prompt, within a prompt while filling a cache, one token against a cache."""

# Dims: B batch, S new tokens, C cache capacity, K key/value head slots, G query heads a slot, H head dim.
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.ops.attention import cached_attention, causal_attention, write_token
from jaxmoe.sharding import Placement

KVCache = list[tuple[jax.Array, jax.Array]]
CACHE_DIMS = ("batch", "kv_head", "length", "head_dim")


def empty_cache(config: ModelConfig, sizes: ArraySizes, *, rows: int, capacity: int, dtype: str) -> KVCache:
    """Keys and values [B,K,C,H] of every layer, all zero."""
    shape = (rows, sizes.kv_slots, capacity, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]


_QUERY_DIMS = ("batch", "length", "kv_head", "head_slot", "head_dim")
_KEY_DIMS = ("batch", "length", "kv_head", "head_dim")


class CausalAttend:
    """Every token over those before it; nothing kept. Rows and heads are independent, so each device does its own."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> jax.Array:
        """See Attend."""
        del layer
        attend = partial(causal_attention, window=window)
        return self._placement.locally(attend, (q, _QUERY_DIMS), (k, _KEY_DIMS), (v, _KEY_DIMS), out=_QUERY_DIMS)


class PrefillAttend(CausalAttend):
    """As CausalAttend; keys and values are written to the head of the cache. `cache` holds the result."""

    def __init__(self, cache: KVCache, placement: Placement) -> None:
        super().__init__(placement)
        self.cache = list(cache)

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> jax.Array:
        """See Attend."""
        keys, values = (
            self._placement.constrain(
                jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), 0, axis=2), *CACHE_DIMS
            )
            for old, new in zip(self.cache[layer], (k, v), strict=True)
        )
        self.cache[layer] = (keys, values)
        return super().__call__(layer, q, k, v, window=window)


class DecodeAttend:
    """One token a row at `positions` [B] over the cache, into which it is written. `cache` holds the result."""

    def __init__(self, cache: KVCache, positions: jax.Array, placement: Placement) -> None:
        self.cache, self._positions, self._placement = list(cache), positions, placement

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None) -> jax.Array:
        """See Attend."""
        keys, values = (
            self._placement.constrain(write_token(old, new, self._positions), *CACHE_DIMS)
            for old, new in zip(self.cache[layer], (k, v), strict=True)
        )
        self.cache[layer] = (keys, values)
        return cached_attention(q, keys, values, self._positions, window=window)

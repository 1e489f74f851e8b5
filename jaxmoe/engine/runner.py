"""The compiled steps: prefill, decode, score. Arrays in, arrays out; caches are donated."""

# Dims: B rows (padded to the mesh), S prompt bucket, C cache capacity, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.errors import RequestError
from jaxmoe.model.attend import CACHE_DIMS, CausalAttend, DecodeAttend, KVCache, PrefillAttend, empty_cache
from jaxmoe.model.transformer import Transformer
from jaxmoe.ops.sample import SamplingArrays, sample
from jaxmoe.sharding import Placement, array_sizes

_SCORE_POSITIONS = 256
# XLA's CPU products of a single row in bfloat16 run ten times slower than those of two (docs/benchmarks.md).
_LEAST_ROWS = 2


def _last(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """hidden [B,S,D] at each row's last token: [B,1,D]."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)


def bucket(value: int, *, least: int = 16) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, 256, 384, ...: few shapes to compile, little padding."""
    size = least
    while size < value:
        size = size * 2 if value > size * 3 // 2 or size < 32 else size * 3 // 2
    return size


class DecodeState(NamedTuple):
    """What one decode step hands to the next, on device: every row's last token [B] and its position [B], the cache."""

    tokens: jax.Array
    positions: jax.Array
    cache: KVCache


class Runner:
    """Holds the weights, split once into flat arrays, and the jitted steps over them."""

    def __init__(self, model: Transformer, *, dtype: str) -> None:
        graph, state = nnx.split(model)
        leaves, structure = jax.tree.flatten(state)
        self.leaves: tuple[jax.Array, ...] = tuple(leaves)
        self.config: ModelConfig = model.config
        self.placement: Placement = model.placement
        self.kernels = model.kernels
        self.sizes = array_sizes(model.config, model.placement)
        self.dtype = dtype
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        # float32 asked for is float32 computed: accelerators would otherwise use shorter products.
        self._precision = "highest" if dtype == "float32" else None
        self.prefill_fn = jax.jit(self._prefill, donate_argnums=(1,))
        self.decode_fn = jax.jit(self._decode, donate_argnums=(1,))
        self.score_fn = jax.jit(self._score)
        self._empty_fn = jax.jit(self._empty, static_argnums=(0, 1), out_shardings=self._cache_sharding())

    def _cache_sharding(self) -> Any:
        lies = self.placement.sharding(*CACHE_DIMS)
        return [(lies, lies)] * self.config.num_hidden_layers

    def _empty(self, rows: int, capacity: int) -> KVCache:
        return empty_cache(self.config, self.sizes, rows=rows, capacity=capacity, dtype=self.dtype)

    def padded_rows(self, num_rows: int) -> int:
        """Rows of the batch for num_rows requests: doubled from the least that every rank of the batch can have."""
        rows = self.placement.parts("batch") * (1 if self.kernels.linear == "native" else _LEAST_ROWS)
        while rows < num_rows:
            rows *= 2
        return rows

    def put(self, values: np.ndarray, *dims: str) -> jax.Array:
        """A host array laid out on the mesh by its logical dims."""
        return jax.device_put(values, self.placement.sharding(*dims))

    def rows_of(self, values: Sequence[tuple[float, int, float, float, int]], num_rows: int) -> SamplingArrays:
        """Sampling values of each request (temperature, top_k, top_p, min_p, seed), padded with greedy rows."""
        padded = [*values, *[(0.0, 0, 1.0, 0.0, 0)] * (num_rows - len(values))]
        dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
        columns = zip(*padded, strict=True)
        return SamplingArrays(
            *(self.put(np.asarray(column, dtype), "batch") for column, dtype in zip(columns, dtypes, strict=True))
        )

    # --- the steps, traced once a shape ---

    def _sampled(self, model: Transformer, hidden, rows, positions, any_drawn):
        logits = model.logits(hidden)[:, 0, : self.config.vocab_size]
        logits = self.placement.constrain(logits, "batch", "one")
        return sample(logits, rows, positions, any_drawn)

    def _prefill(self, leaves, cache, tokens, lengths, rows, any_drawn):
        model = self._merge(leaves)
        attend = PrefillAttend(cache, self.placement)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = model(tokens, positions, positions < lengths[:, None], attend)
        token, logprobs = self._sampled(model, _last(hidden, lengths), rows, lengths, any_drawn)
        return DecodeState(token, lengths, attend.cache), token, logprobs

    def _decode(self, leaves, state, active, rows, any_drawn):
        model = self._merge(leaves)
        attend = DecodeAttend(state.cache, state.positions, self.placement)
        hidden, _ = model(state.tokens[:, None], state.positions[:, None], active[:, None], attend)
        positions = jnp.where(active, state.positions + 1, state.positions)
        token, logprobs = self._sampled(model, hidden, rows, positions, any_drawn)
        return DecodeState(token, positions, attend.cache), token, logprobs

    def _score(self, leaves, tokens, lengths):
        model = self._merge(leaves)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = model(tokens, positions, positions < lengths[:, None], CausalAttend(self.placement))
        target = jnp.roll(tokens, -1, axis=1)
        strips = []
        for start in range(0, tokens.shape[1], _SCORE_POSITIONS):  # never the logits of a whole prompt at once
            part = slice(start, start + _SCORE_POSITIONS)
            logits = model.logits(hidden[:, part])
            logits = self.placement.constrain(logits, "batch", "length", "one")
            picked = jnp.take_along_axis(logits, target[:, part, None], axis=-1)[..., 0]
            strips.append(picked - jax.nn.logsumexp(logits, axis=-1))
        logits = model.logits(_last(hidden, lengths))[:, 0, : self.config.vocab_size]
        return jnp.concatenate(strips, axis=1), self.placement.constrain(logits, "batch", "one")

    # --- called by the engine ---

    def _precisely(self):
        return jax.default_matmul_precision(self._precision) if self._precision else nullcontext()

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A zeroed cache on the mesh. Raises: RequestError if the devices have no room for it."""
        try:
            return jax.block_until_ready(self._empty_fn(rows, capacity))
        except (jax.errors.JaxRuntimeError, OverflowError) as error:
            numbers = rows * capacity * self.sizes.kv_slots * self.config.head_dim * 2 * self.config.num_hidden_layers
            gib = numbers * jnp.dtype(self.dtype).itemsize / 2**30
            raise RequestError(
                f"a cache of {rows} rows x {capacity} tokens takes {gib:.1f} GiB over {self.placement.mesh.size} "
                f"device(s), which have no room for it: lower max_tokens or max_batch"
            ) from error

    def prefill(
        self, cache: KVCache, tokens: np.ndarray, lengths: np.ndarray, rows: SamplingArrays, any_drawn: bool
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        """tokens [B,S] right-padded, lengths [B] -> state, the first new tokens [B], their logprobs [B]."""
        with self._precisely():
            return self.prefill_fn(
                self.leaves,
                cache,
                self.put(tokens, "batch", "length"),
                self.put(lengths, "batch"),
                rows,
                np.bool_(any_drawn),
            )

    def decode(
        self, state: DecodeState, active: jax.Array, rows: SamplingArrays, any_drawn: bool
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        """One step of every active row: new state, new tokens [B] (they outlive the state), logprobs [B]."""
        with self._precisely():
            return self.decode_fn(self.leaves, state, active, rows, np.bool_(any_drawn))

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """tokens [B,S] -> log-probability of the token that follows each place [B,S], logits after the last [B,V]."""
        with self._precisely():
            return self.score_fn(self.leaves, self.put(tokens, "batch", "length"), self.put(lengths, "batch"))

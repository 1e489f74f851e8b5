"""The compiled programs: a step of the engine, and scoring. Arrays in, arrays out; pages are donated."""

# Dims: B rows (padded to the mesh), S prompt bucket, V vocabulary; r ranks of the batch, each with d decode rows,
# n blocks of q prompt tokens, t = d + n * q tokens in all.
from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import Bucket
from jaxmoe.errors import RequestError
from jaxmoe.model.attend import PAGE_DIMS, Blocks, CausalAttend, KVPages, PagedAttend, empty_pages
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


class EngineState(NamedTuple):
    """What one step hands to the next, on device: the last token of every row [r, rows], and the pages."""

    tokens: jax.Array
    pages: KVPages


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
        self.step_fn = jax.jit(self._step, donate_argnums=(1,), static_argnames=("bucket",))
        self.score_fn = jax.jit(self._score)
        self._empty_fn = jax.jit(self._empty, static_argnums=(0, 1, 2), out_shardings=self._state_sharding())

    @property
    def num_ranks(self) -> int:
        """Ranks that share the batch."""
        return self.placement.parts("batch")

    @property
    def least_rows(self) -> int:
        """Rows of a rank that a step should have at least."""
        return 1 if self.kernels.linear == "native" else _LEAST_ROWS

    @property
    def bytes_a_token(self) -> int:
        """Bytes of keys and values of one token, over all devices that share its rank."""
        numbers = self.sizes.kv_slots * self.config.head_dim * 2 * self.config.num_hidden_layers
        return numbers * jnp.dtype(self.dtype).itemsize

    def _state_sharding(self) -> Any:
        lies = self.placement.sharding(*PAGE_DIMS)
        tokens: Any = self.placement.sharding("batch", "one")
        pages: Any = [(lies, lies)] * self.config.num_hidden_layers
        return EngineState(tokens, pages)

    def _empty(self, rows: int, num_pages: int, page_size: int) -> EngineState:
        total = num_pages * self.num_ranks
        pages = empty_pages(self.config, self.sizes, num_pages=total, page_size=page_size, dtype=self.dtype)
        return EngineState(jnp.zeros((self.num_ranks, rows), jnp.int32), pages)

    def padded_rows(self, num_rows: int) -> int:
        """Rows of a batch to score for num_rows prompts: doubled from the least that every rank can have."""
        rows = self.num_ranks * self.least_rows
        while rows < num_rows:
            rows *= 2
        return rows

    def put(self, values: np.ndarray, *dims: str) -> jax.Array:
        """A host array laid out on the mesh by its logical dims."""
        return jax.device_put(values, self.placement.sharding(*dims))

    # --- the steps, traced once a shape ---

    def _step(self, leaves, state: EngineState, packed: jax.Array, any_drawn: jax.Array, *, bucket: Bucket):
        model, place = self._merge(leaves), self.placement
        told = bucket.split(packed)
        ranks, size = packed.shape[0], bucket.block_tokens
        block_at = told["block_positions"][..., None] + jnp.arange(size)
        block_real = jnp.arange(size) < told["block_counts"][..., None]

        def flat(rows, blocks):
            """[r,d] and [r,n,q] -> [r*t,1], a rank's rows before its blocks."""
            both = jnp.concatenate([rows, blocks.reshape(ranks, -1)], axis=1)
            return place.constrain(both.reshape(-1, 1), "batch", "length")

        tokens = flat(state.tokens[:, : bucket.rows], told["block_tokens"])
        positions = flat(told["row_positions"], block_at)
        active = flat(told["row_counts"] > 0, block_real)
        sections = [
            Blocks(1, told["table"][:, : bucket.rows], told["row_positions"], told["row_counts"]),
            Blocks(size, told["table"][:, bucket.rows :], told["block_positions"], told["block_counts"]),
        ]
        attend = PagedAttend(state.pages, sections[: 1 + (bucket.blocks > 0)], place, self.kernels.attention)
        hidden, _ = model(tokens, positions, active, attend)

        hidden = hidden.reshape(ranks, bucket.num_tokens, -1)
        ends = bucket.rows + jnp.arange(bucket.blocks) * size + jnp.maximum(told["block_counts"] - 1, 0)
        drawn_from = place.locally(  # rows, and the last token of each block
            lambda hidden, ends: jnp.concatenate(
                [hidden[:, : bucket.rows], jnp.take_along_axis(hidden, ends[..., None], axis=1)], axis=1
            ),
            (hidden, ("batch", "block", "width")), (ends, ("batch", "block")), out=("batch", "block", "width"),
        )  # fmt: skip
        at = jnp.concatenate([told["row_positions"], told["block_positions"] + told["block_counts"] - 1], axis=1) + 1
        token, logprobs = self._sampled(model, drawn_from.reshape(-1, 1, hidden.shape[-1]), told, at, any_drawn)
        token, logprobs = (part.reshape(ranks, -1) for part in (token, logprobs))

        slots = jnp.where(told["row_counts"] > 0, jnp.arange(bucket.rows), state.tokens.shape[1])
        slots = jnp.concatenate([slots, told["block_slots"]], axis=1)
        kept = place.locally(
            jax.vmap(lambda kept, slots, token: kept.at[slots].set(token, mode="drop")),
            *((part, ("batch", "one")) for part in (state.tokens, slots, token)), out=("batch", "one"),
        )  # fmt: skip
        return EngineState(kept, attend.pages), token, logprobs

    def _sampled(self, model: Transformer, hidden, told, positions, any_drawn):
        logits = model.logits(hidden)[:, 0, : self.config.vocab_size]
        logits = self.placement.constrain(logits, "batch", "one")
        as_float = lambda part: jax.lax.bitcast_convert_type(part, jnp.float32)  # noqa: E731
        rows = SamplingArrays(
            temperature=as_float(told["temperature"]).reshape(-1),
            top_k=told["top_k"].reshape(-1),
            top_p=as_float(told["top_p"]).reshape(-1),
            min_p=as_float(told["min_p"]).reshape(-1),
            seed=jax.lax.bitcast_convert_type(told["seed"], jnp.uint32).reshape(-1),
        )
        return sample(logits, rows, positions.reshape(-1), any_drawn)

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

    def empty_state(self, rows: int, num_pages: int, page_size: int) -> EngineState:
        """Rows and pages of every rank, zeroed. Raises: RequestError if the devices have no room for them."""
        try:
            return jax.block_until_ready(self._empty_fn(rows, num_pages, page_size))
        except (jax.errors.JaxRuntimeError, OverflowError) as error:
            gib = self.bytes_a_token * num_pages * page_size * self.num_ranks / 2**30
            raise RequestError(
                f"{num_pages} pages of {page_size} tokens take {gib:.1f} GiB over {self.placement.mesh.size} "
                f"device(s), which have no room for it: lower max_tokens or max_batch"
            ) from error

    def step(
        self, state: EngineState, packed: np.ndarray, any_drawn: bool, bucket: Bucket
    ) -> tuple[EngineState, jax.Array, jax.Array]:
        """One step: new state, tokens and their logprobs [r, rows + blocks]. state is donated."""
        with self._precisely():
            told = self.put(packed, "batch", "one")
            return self.step_fn(self.leaves, state, told, np.bool_(any_drawn), bucket=bucket)

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """tokens [B,S] -> log-probability of the token that follows each place [B,S], logits after the last [B,V]."""
        with self._precisely():
            return self.score_fn(self.leaves, self.put(tokens, "batch", "length"), self.put(lengths, "batch"))

"""The compiled programs: a step of the engine, and scoring. Arrays in, arrays out; pages are donated."""

# Dims: B rows (padded to the mesh), S prompt bucket, V vocabulary; r ranks of the batch, each with d rows,
# n blocks of q prompt tokens, t = d + n * q tokens in all; T turns, L likeliest tokens.
from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import FLOAT_PARTS, Bucket
from jaxmoe.errors import RequestError
from jaxmoe.model.attend import (
    PAGE_DIMS,
    TOKEN_PAGE_DIMS,
    CausalAttend,
    KVPages,
    PagedAttend,
    Section,
    empty_pages,
)
from jaxmoe.model.transformer import Transformer
from jaxmoe.ops.quantize import LARGEST
from jaxmoe.ops.sample import MOST_TOP, Sampled, SamplingArrays, Wanted, sample
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
    """What one step hands to the next, on device: the last token of every row [r, rows], the pages of keys and values,
    and the token ids in them [pages, page_size]."""

    tokens: jax.Array
    pages: KVPages
    token_pages: jax.Array


class Drawn(NamedTuple):
    """What a step brings, of each turn and row: tokens and logprobs [T,r,d], the likeliest and theirs [T,r,d,L].

    expert_counts [T,r,layers,E]: tokens of a rank that chose each expert of each MoE layer; no layers unless traced.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    expert_counts: jax.Array


class Runner:
    """Holds the weights, split once into flat arrays, and the jitted steps over them."""

    def __init__(self, model: Transformer, *, dtype: str, kv_dtype: str | None = None) -> None:
        """kv_dtype: of keys and values in pages; that of the activations by default."""
        graph, state = nnx.split(model)
        leaves, structure = jax.tree.flatten(state)
        self.leaves: tuple[jax.Array, ...] = tuple(leaves)
        self.config: ModelConfig = model.config
        self.placement: Placement = model.placement
        self.kernels, self.parts = model.kernels, model.parts
        self.sizes = array_sizes(model.config, model.placement)
        self.dtype, self.kv_dtype = dtype, dtype if kv_dtype is None else kv_dtype
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        # float32 asked for is float32 computed: accelerators would otherwise use shorter products.
        self._precision = "highest" if dtype == "float32" else None
        self.step_fn = jax.jit(self._step, donate_argnums=(1,), static_argnames=("bucket", "turns", "traced"))
        self.score_fn = jax.jit(self._score)
        self._empty_fn = jax.jit(self._empty, static_argnums=(0, 1, 2), out_shardings=self._state_sharding())

    @property
    def num_ranks(self) -> int:
        """Ranks that share the batch."""
        return self.placement.parts("batch")

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the activations."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def least_rows(self) -> int:
        """Rows of a rank that a step should have at least."""
        return 1 if self.kernels.linear == "native" else _LEAST_ROWS

    @property
    def bytes_a_token(self) -> int:
        """Bytes of keys and values (and their scales) of one token, over all devices that share its rank."""
        scale = 4 if self.kv_dtype in LARGEST else 0
        head = self.config.head_dim * jnp.dtype(self.kv_dtype).itemsize + scale
        return self.sizes.kv_slots * head * 2 * self.config.num_hidden_layers

    def _state_sharding(self) -> Any:
        lie = self.placement.sharding
        block = tuple(lie(*PAGE_DIMS[:ndim]) for ndim in ((5, 5, 4, 4) if self.kv_dtype in LARGEST else (5, 5)))
        pages: Any = [(block,) * part.period for part in self.parts]
        tokens, token_pages = lie("batch", "one"), lie(*TOKEN_PAGE_DIMS)
        return EngineState(*cast("Any", (tokens, pages, token_pages)))

    def _empty(self, rows: int, num_pages: int, page_size: int) -> EngineState:
        total = num_pages * self.num_ranks
        pages = empty_pages(
            self.config, self.sizes, self.parts, num_pages=total, page_size=page_size, dtype=self.kv_dtype
        )
        tokens, token_pages = jnp.zeros((self.num_ranks, rows), jnp.int32), jnp.zeros((total, page_size), jnp.int32)
        return EngineState(tokens, pages, token_pages)

    def padded_rows(self, num_rows: int) -> int:
        """Rows over all ranks for num_rows prompts or requests: doubled from the least that every rank can have."""
        rows = self.num_ranks * self.least_rows
        while rows < num_rows:
            rows *= 2
        return rows

    def put(self, values: np.ndarray, *dims: str) -> jax.Array:
        """A host array laid out on the mesh by its logical dims."""
        return jax.device_put(values, self.placement.sharding(*dims))

    # --- the steps, traced once a shape ---

    def _step(
        self, leaves, state: EngineState, packed: jax.Array, flags: jax.Array, count,
        *, bucket: Bucket, turns: int, traced: bool,
    ):  # fmt: skip
        """flags: of Wanted; count: turns to take, of `turns` there is room for."""
        take = partial(self._turn, self._merge(leaves), bucket.split(packed), Wanted(*flags), bucket, traced)
        if turns == 1:
            state, drawn = take(state, 0)
            return state, Drawn(*(part[None] for part in drawn))

        def body(turn, carry):
            state, drawn = take(carry[0], turn)
            return state, Drawn(*(room.at[turn].set(one) for room, one in zip(carry[1], drawn, strict=True)))

        return jax.lax.fori_loop(0, count, body, (state, self._room(turns, bucket.rows, traced)))

    def _room(self, turns: int, rows: int, traced: bool) -> Drawn:
        per_row, top = (turns, self.num_ranks, rows), min(MOST_TOP, self.config.vocab_size)
        counts = self._num_counted(traced), self.config.moe.num_experts if self.config.moe else 0
        return Drawn(
            tokens=jnp.zeros(per_row, jnp.int32), logprobs=jnp.zeros(per_row),
            top_tokens=jnp.zeros((*per_row, top), jnp.int32), top_logprobs=jnp.zeros((*per_row, top)),
            expert_counts=jnp.zeros((turns, self.num_ranks, *counts), jnp.int32),
        )  # fmt: skip

    def _num_counted(self, traced: bool) -> int:
        """MoE layers whose experts are counted."""
        return sum(self.config.moe_layers) if traced else 0

    def _turn(
        self, model: Transformer, told, wanted: Wanted, bucket: Bucket, traced: bool, state: EngineState, turn
    ) -> tuple[EngineState, Drawn]:
        """One pass through the model; each row that draws gets one token. Turns after the first only decode."""
        place, ranks, size = self.placement, told["counts"].shape[0], bucket.block_tokens
        decodes = (told["counts"] > turn).astype(jnp.int32)
        row_at = told["positions"] + turn
        sections = [Section(1, None, row_at, decodes)]
        tokens, positions, active = state.tokens[:, : bucket.rows], row_at, decodes > 0
        if bucket.blocks:
            sections.append(Section(size, told["block_rows"], told["block_positions"], told["block_counts"]))
            block_at = told["block_positions"][..., None] + jnp.arange(size)
            block_real = jnp.arange(size) < told["block_counts"][..., None]
            tokens, positions, active = (
                jnp.concatenate([row, block.reshape(ranks, -1)], axis=1)
                for row, block in ((tokens, told["block_tokens"]), (positions, block_at), (active, block_real))
            )
        tokens, positions, active = (
            place.constrain(part.reshape(-1, 1), "batch", "length") for part in (tokens, positions, active)
        )
        attend = PagedAttend(told["table"], sections, place, self.kernels.attention)
        hidden, pages, routed = model(tokens, positions, active, attend, state.pages, routing=traced)
        counts = self._expert_counts(routed, active)
        token_pages = attend.write_tokens(state.token_pages, tokens)

        hidden, positions = hidden.reshape(ranks, bucket.num_tokens, -1), positions.reshape(ranks, -1)
        draws = (told["drawn_from"] >= 0) & ((told["counts"] > turn) | (told["counts"] == 0))
        if bucket.blocks:
            hidden, positions = self._at_rows(hidden, positions, jnp.maximum(told["drawn_from"], 0))
        logits = model.logits(hidden.reshape(-1, 1, hidden.shape[-1]))
        logits = logits.reshape(ranks, bucket.rows, -1)[..., : self.config.vocab_size]
        drawn = Drawn(*self._sampled(logits, told, token_pages, positions + 1, wanted), counts)
        kept = jnp.where(draws, drawn.tokens, state.tokens[:, : bucket.rows])
        kept = jax.lax.dynamic_update_slice(state.tokens, kept, (0, 0))
        return EngineState(place.constrain(kept, "batch", "one"), pages, token_pages), drawn

    def _expert_counts(self, routed: list[jax.Array], active: jax.Array) -> jax.Array:
        """[r,layers,E]: tokens of each rank that chose each expert. routed: probabilities [r*t,1,E] of each layer."""
        moe = self.config.moe
        if moe is None or not routed:
            return jnp.zeros((self.num_ranks, 0, moe.num_experts if moe else 0), jnp.int32)

        def count(active, *layers):
            chosen = [jax.lax.top_k(layer[:, 0], moe.num_experts_per_tok)[1] for layer in layers]
            hits = [(each[..., None] == jnp.arange(moe.num_experts)) & active[..., None] for each in chosen]
            return jnp.stack([jnp.sum(each, axis=(0, 1), dtype=jnp.int32) for each in hits])[None]

        dims = ("batch", "length", "router_expert")
        return self.placement.locally(
            count, (active, dims[:2]), *((layer, dims) for layer in routed), out=("batch", "one", "router_expert")
        )

    def _at_rows(self, hidden: jax.Array, positions: jax.Array, index: jax.Array):
        """hidden [r,t,D] and positions [r,t] at index [r,d] of each rank."""

        def pick(hidden, positions, index):
            taken = jnp.take_along_axis(hidden, index[..., None], axis=1)
            return taken, jnp.take_along_axis(positions, index, axis=1)

        return self.placement.locally(
            pick, (hidden, ("batch", "block", "width")), (positions, ("batch", "block")), (index, ("batch", "block")),
            out=(("batch", "block", "width"), ("batch", "block")),
        )  # fmt: skip

    def _sampled(
        self, logits: jax.Array, told, token_pages: jax.Array, positions: jax.Array, wanted: Wanted
    ) -> Sampled:
        """A token a row, drawn by each rank for its own. logits [r,d,V]; positions [r,d]: where the tokens stand."""
        values = {name: told[name] for name in SamplingArrays._fields}
        for name in FLOAT_PARTS:
            values[name] = jax.lax.bitcast_convert_type(values[name], jnp.float32)
        values["seed"] = jax.lax.bitcast_convert_type(values["seed"], jnp.uint32)
        names = list(values)

        def on_rank(logits, token_pages, table, positions, wanted, *arrays):
            rows = SamplingArrays(**{name: array[0] for name, array in zip(names, arrays, strict=True)})
            kind = self.kernels.sampling
            drawn = sample(logits[0], rows, token_pages, table[0], positions[0], Wanted(*wanted), kind=kind)
            return tuple(part[None] for part in drawn)

        per_row = ("batch", "block")
        drawn = self.placement.locally(
            on_rank,
            (logits, (*per_row, "one")), (token_pages, TOKEN_PAGE_DIMS), (told["table"], (*per_row, "one")),
            (positions, per_row), (jnp.stack(wanted), ("one",)),
            *((values[name], (*per_row, "one")[: values[name].ndim]) for name in names),
            out=(per_row, per_row, (*per_row, "one"), (*per_row, "one")),
        )  # fmt: skip
        return Sampled(*drawn)

    def _score(self, leaves, tokens, lengths):
        model = self._merge(leaves)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, *_ = model(tokens, positions, positions < lengths[:, None], CausalAttend(self.placement))
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
        self, state: EngineState, packed: np.ndarray, wanted: tuple[bool, bool, bool], bucket: Bucket,
        *, count: int, turns: int, traced: bool = False,
    ) -> tuple[EngineState, Drawn]:  # fmt: skip
        """One step of `count` turns where there is room for `turns` (one where there are blocks). state is donated.

        wanted: whether any row draws, has penalties or biases, asks for the likeliest tokens. traced: count experts.
        """
        with self._precisely():
            told = self.put(packed, "batch", "one")
            flags = np.array(wanted, np.bool_)
            static: Any = dict(bucket=bucket, turns=turns, traced=traced)
            return self.step_fn(self.leaves, state, told, flags, np.int32(count), **static)

    def abstract_state(self, rows: int, num_pages: int, page_size: int) -> EngineState:
        """The shapes of empty_state, and how they lie."""
        shapes = jax.eval_shape(lambda: self._empty(rows, num_pages, page_size))
        place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, shapes, self._state_sharding())

    def lower(self, state: EngineState, bucket: Bucket, *, turns: int) -> Any:
        """The step of one bucket, lowered for the devices of the mesh, without running it."""
        packed = jax.ShapeDtypeStruct(
            (self.num_ranks, bucket.length), jnp.int32, sharding=self.placement.sharding("batch", "one")
        )
        with self._precisely():
            flags = jax.ShapeDtypeStruct((3,), jnp.bool_, sharding=self.placement.sharding("one"))
            count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.placement.sharding())
            return self.step_fn.lower(
                self.leaves, state, packed, flags, count, bucket=bucket, turns=turns, traced=False
            )

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """tokens [B,S] -> log-probability of the token that follows each place [B,S], logits after the last [B,V]."""
        with self._precisely():
            return self.score_fn(self.leaves, self.put(tokens, "batch", "length"), self.put(lengths, "batch"))

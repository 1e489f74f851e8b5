"""The compiled programs: an engine step, and scoring. Both take and return arrays; KV pages are donated."""

# Dims: B rows (padded to the mesh), S prompt bucket, V vocabulary; r ranks of the batch, each with d rows and
# n blocks of q prompt tokens, t = d + n * q tokens in total; T decode steps, L top log-probabilities; K sampled tokens
# of a row in one pass, W words of a token bitmask.
from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import BLOCK_TOKENS, StepBucket
from jaxmoe.engine.experts import ExpertManager
from jaxmoe.engine.step_programs import (
    EngineState,
    StepOutput,
    for_every_process,
    last_sampled,
    output_buffers,
    sample_logits,
    sampled_positions,
    score_prompts,
)  # fmt: skip
from jaxmoe.engine.step_traffic import StepTraffic
from jaxmoe.errors import RequestError
from jaxmoe.model.attend import (
    PAGE_DIMS,
    TOKEN_PAGE_DIMS,
    PagedStepInputs,
    QueryBlocks,
    empty_pages,
    micro_batch_of,
    split_rows,
)
from jaxmoe.model.transformer import ForwardState, TokensPerExpert, TransformerModel, at_rows
from jaxmoe.ops.sampling import SamplerOutput, SamplingFeatures
from jaxmoe.parallel.eplb import ExpertPlacement
from jaxmoe.parallel.mesh import compiler_options
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.parallel.stages import LayerSegment, PipelineSchedule
from jaxmoe.quantization.formats import QMAX
from jaxmoe.weights.params import parameter_table

# XLA's CPU matmuls of a single bfloat16 row run ten times slower than matmuls of two rows (docs/benchmarks.md).
_MIN_SEQ_SLOTS = 2
_BITMASK_DIMS = ("batch", "unsharded", "unsharded", "unsharded")


def bucket(value: int, *, least: int = 16) -> int:
    """Round up to one of 16, 32, 48, 64, 96, 128, 192, 256, 384, ...: few shapes to compile, little padding."""
    size = least
    while size < value:
        size = size * 2 if value > size * 3 // 2 or size < 32 else size * 3 // 2
    return size


class ModelRunner:
    """Hold the weights as a flat list of arrays, and the jitted steps that read them."""

    def __init__(self, model: TransformerModel, *, dtype: str, kv_dtype: str | None = None) -> None:
        """dtype: of activations. kv_dtype: of keys and values in pages; by default that of activations."""
        graph, state = nnx.split(model)
        leaves, structure = jax.tree.flatten(state)
        self.leaves: list[jax.Array] = leaves
        self._leaves_lock = threading.Lock()  # guards leaves while a step is dispatched or experts move
        self.config: ModelConfig = model.config
        self.placement: MeshPlacement = model.placement
        self.kernels, self.segments = model.kernels, model.layer_segments
        self.sizes = segment_sizes(model.config, model.placement, model.layer_segments)
        self.dtype, self.kv_dtype = dtype, dtype if kv_dtype is None else kv_dtype
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        # Accelerators would otherwise compute float32 matmuls in lower precision.
        self._precision = "highest" if dtype == "float32" else None
        options = compiler_options(self.placement.mesh)
        static = ("bucket", "max_decode_steps", "traced")
        self.step_fn = jax.jit(self._step, donate_argnums=(1,), static_argnames=static, compiler_options=options)
        self.score_fn = jax.jit(self._score, compiler_options=options)
        table = parameter_table(state, self.placement)
        self.experts = ExpertManager(self.config, self.placement, self.segments, self.sizes, table)
        self._all_allowed: dict[tuple[int, ...], jax.Array] = {}
        self.traffic = StepTraffic(
            model.config, model.placement, dispatch=model.kernels.dispatch, itemsize=self.itemsize
        )
        self._empty_fn = jax.jit(self._empty, static_argnums=(0, 1, 2), out_shardings=self._state_sharding())

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks that shard the batch."""
        return self.placement.num_shards("batch")

    @property
    def context_ranks(self) -> int:
        """Return the number of context-parallel ranks, which shard each request's KV cache and the tokens of a step."""
        return self.placement.num_shards("page_token")

    @property
    def block_shares(self) -> int:
        """Return the alignment of prompt blocks, in tokens.

        It is the least common multiple of the context-parallel ranks and MeshPlacement.strip_tokens, the alignment that
        sequence parallelism needs. If strip_tokens exceeds BLOCK_TOKENS, their greatest common divisor takes its place.
        """
        whole = self.placement.strip_tokens
        return math.lcm(self.context_ranks, whole if whole <= BLOCK_TOKENS else math.gcd(whole, BLOCK_TOKENS))

    @property
    def itemsize(self) -> int:
        """Return the bytes of one activation value."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def min_seq_slots(self) -> int:
        """Return the minimum number of sequence slots of a rank, which fills every pipeline stage and context-parallel
        rank."""
        return (
            self.placement.num_stages * self.context_ranks * (1 if self.kernels.linear == "native" else _MIN_SEQ_SLOTS)
        )

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of keys, values and their scales of one token, over all devices that share its rank."""
        return self._bytes_per_token(lambda segment: 1)

    @property
    def device_bytes_per_token(self) -> int:
        """Return the KV cache bytes of one token on one device of the context-parallel rank that holds it."""

        def devices(segment: LayerSegment) -> int:
            placement = self.placement.for_params(segment)
            return placement.num_shards("layer") * placement.num_shards("kv_head")

        return self._bytes_per_token(devices)

    def _bytes_per_token(self, share: Callable[[LayerSegment], int]) -> int:
        itemsize, scale = jnp.dtype(self.kv_dtype).itemsize, 4 if self.kv_dtype in QMAX else 0
        total = 0.0
        for segment, sizes in zip(self.segments, self.sizes, strict=True):
            head = sum(
                self.config.cache_spec(segment.first + number).bytes_per_head(itemsize, scale)
                for number in range(segment.period)
            )
            total += head * segment.slots * sizes.kv_slots / share(segment)
        return int(total)

    def _state_sharding(self) -> Any:
        lie, kinds = self.placement.sharding, (5, 4) if self.kv_dtype in QMAX else (5,)

        def block(segment: LayerSegment, number: int) -> tuple[Any, ...]:
            placement = self.placement.for_params(segment)
            head_dims = self.config.cache_spec(segment.first + number).head_dims
            return tuple(placement.sharding(*PAGE_DIMS[:ndim]) for ndim in kinds for _ in head_dims)

        pages: Any = [tuple(block(segment, number) for number in range(segment.period)) for segment in self.segments]
        tokens, token_pages = lie("batch", "unsharded"), lie(*TOKEN_PAGE_DIMS)
        return EngineState(*cast("Any", (tokens, pages, token_pages)))

    def _empty(self, max_num_seqs: int, num_pages: int, page_size: int) -> EngineState:
        total = num_pages * self.num_ranks
        pages = empty_pages(
            self.config, self.sizes, self.segments, num_pages=total, page_size=page_size, dtype=self.kv_dtype
        )
        tokens, token_pages = (
            jnp.zeros((self.num_ranks, max_num_seqs), jnp.int32),
            jnp.zeros((total, page_size), jnp.int32),
        )
        return EngineState(tokens, pages, token_pages)

    def padded_num_seqs(self, num_seqs: int) -> int:
        """Return the number of sequence slots over all ranks that num_seqs sequences need.

        The slots per rank are min_seq_slots, doubled until all sequences fit. A layout with sequence parallelism rounds
        them up further, so that the tokens shard evenly.
        """
        seq_slots = self.min_seq_slots
        while seq_slots * self.num_ranks < num_seqs:
            seq_slots *= 2
        placement = self.placement
        if placement.sequence_gather_axes("sequence_sharded"):  # bucket_with adds prompt blocks for steps with prompts
            even = self.block_shares * placement.num_stages
            seq_slots = -(-seq_slots // even) * even
        return seq_slots * self.num_ranks

    def put(self, values: np.ndarray, *dims: str) -> jax.Array:
        """Put a host array on the mesh, sharded by its logical dims."""
        return self.placement.put(values, *dims)

    # --- the steps, traced once per shape ---

    def _step(
        self, leaves, state: EngineState, packed: jax.Array, token_bitmask: jax.Array, flags: jax.Array, decode_steps,
        *, bucket: StepBucket, max_decode_steps: int, traced: bool,
    ):  # fmt: skip
        """Run one engine step of decode_steps decode steps, at most max_decode_steps.

        flags: the SamplingFeatures. Every sampling row yields one token per decode step, or one for each of its
        logits_indices if max_decode_steps is 1. If max_decode_steps is 1, as
        in every step with prompts, all micro-batches pass through the model before any token is sampled. Otherwise each
        micro-batch is sampled as soon as it leaves the model, and its next decode step begins.
        """
        model, features = self._merge(leaves), SamplingFeatures(*flags)
        metadata = bucket.split(packed) | {"token_bitmask": token_bitmask}
        tokens_per_expert = self._zero_tokens_per_expert(bucket) if traced else None
        if max_decode_steps == 1:
            return self._single_step(model, state, tokens_per_expert, metadata, features, bucket)
        assert not bucket.blocks
        return self._decode(model, state, tokens_per_expert, metadata, features, bucket, decode_steps, max_decode_steps)

    def _zero_tokens_per_expert(self, bucket: StepBucket) -> TokensPerExpert:
        """Return zero token counts [slots,n,R] of n routing ranks and R physical experts, for every MoE layer."""
        rows = self.num_ranks * bucket.num_tokens // bucket.micro_batches

        def block(segment: LayerSegment, number: int) -> jax.Array | None:
            if not self.config.moe_layers[segment.first + number]:
                return None
            placement = self.placement.for_params(segment)
            routed = placement.routed(placement.token_dim(rows))
            zeros = jnp.zeros(
                (segment.slots, placement.num_shards(routed), self.experts.num_physical_experts), jnp.int32
            )
            return placement.constrain(zeros, "layer", routed, "router_expert")

        return [tuple(block(segment, number) for number in range(segment.period)) for segment in self.segments]

    def _schedule(self, micro_batches: int) -> PipelineSchedule:
        placement = self.placement
        return PipelineSchedule(
            stages=placement.num_stages, virtual_stages=placement.virtual_stages, micro_batches=micro_batches
        )

    def _single_step(
        self, model: TransformerModel, state: EngineState, tokens_per_expert: TokensPerExpert | None, metadata,
        features: SamplingFeatures, bucket: StepBucket,
    ):  # fmt: skip
        placement, ranks, parts = self.placement.with_view("in_stage"), self.num_ranks, bucket.micro_batches
        query_blocks = [
            QueryBlocks(
                num_tokens=1, seq_slots=None, positions=metadata["positions"], query_lens=metadata["query_lens"]
            )
        ]
        tokens, pick = [state.tokens[:, : bucket.seq_slots]], None
        if bucket.blocks:
            blocks = {name: metadata[f"block_{name}"] for name in ("seq_slots", "positions", "query_lens")}
            query_blocks.append(QueryBlocks(num_tokens=bucket.block_tokens, **blocks))
            tokens.append(metadata["block_tokens"])
            pick = partial(at_rows, index=jnp.maximum(metadata["logits_indices"], 0).reshape(ranks, -1))
        step_inputs = PagedStepInputs(
            block_table=metadata["block_table"], query_blocks=tuple(query_blocks), backend=self.kernels.attention
        )
        whole = step_inputs.attention_backend(0, 1)
        together = jnp.concatenate([part.reshape(ranks, -1) for part in tokens], axis=1).reshape(-1, 1)
        token_pages = whole.write_tokens(state.token_pages, together, placement)
        by_part = jnp.concatenate([part.reshape(ranks, parts, -1) for part in tokens], axis=2).reshape(-1, 1)
        by_part = placement.constrain(by_part, "batch", "length")
        forward_state = ForwardState(list(state.pages), tokens_per_expert)
        hidden, forward_state, _ = model(by_part, step_inputs, forward_state, schedule=self._schedule(parts), pick=pick)
        positions = sampled_positions(metadata)
        sampled = self._sample_hidden(model, hidden, metadata, token_pages, positions, features)
        last_tokens = last_sampled(sampled, metadata, state.tokens[:, : bucket.seq_slots])
        last_tokens = jax.lax.dynamic_update_slice(state.tokens, last_tokens, (0, 0))
        state = EngineState(placement.constrain(last_tokens, "batch", "unsharded"), forward_state.kv_cache, token_pages)
        return state, for_every_process(StepOutput(sampled, forward_state.tokens_per_expert), self.placement)

    def _decode(
        self, model: TransformerModel, state: EngineState, tokens_per_expert: TokensPerExpert | None, metadata,
        features: SamplingFeatures, bucket: StepBucket, decode_steps, max_decode_steps: int,
    ):  # fmt: skip
        placement, ranks, seq_slots = self.placement.with_view("outside_pipeline"), self.num_ranks, bucket.seq_slots
        schedule, of = self._schedule(bucket.micro_batches), bucket.micro_batches
        blocks = QueryBlocks(
            num_tokens=1, seq_slots=None, positions=metadata["positions"], query_lens=metadata["query_lens"]
        )
        step_inputs = PagedStepInputs(
            block_table=metadata["block_table"], query_blocks=(blocks,), backend=self.kernels.attention
        )

        def tick(number, carry):
            state, tokens_per_expert, buffers, room = carry
            first = schedule.slot(number, 0, decode_steps)
            enters = first.micro_batch, of, first.decode_step, first.valid & (first.virtual_stage == 0)
            entering = step_inputs.part(*enters)
            tokens = micro_batch_of(state.tokens[:, :seq_slots].reshape(-1, 1), first.micro_batch, of, ranks)
            tokens = placement.constrain(tokens, "batch", "length")
            token_pages = step_inputs.attention_backend(*enters).write_tokens(state.token_pages, tokens, placement)
            x, forward_state = model.before(
                model.embedded(tokens), entering, ForwardState(list(state.pages), tokens_per_expert)
            )
            last, leaves = first, first.valid
            if schedule.stages > 1:
                buffers, forward_state = model.tick(
                    buffers, x, step_inputs, forward_state, number, schedule, decode_steps
                )
                last = schedule.slot(number, schedule.stages - 1, decode_steps)
                leaves = last.valid & (last.virtual_stage == schedule.virtual_stages - 1)
                leaving = step_inputs.part(last.micro_batch, of, last.decode_step, leaves)
                x, forward_state = model.after(model.from_last(buffers.sent), leaving, forward_state)
            own = {name: split_rows(part, last.micro_batch, of) for name, part in metadata.items()}
            positions = own["positions"] + last.decode_step
            hidden = model.apply_final_norm(x)
            sampled = self._sample_hidden(model, hidden, own, token_pages, positions[..., None], features)
            sampled = SamplerOutput(*(part[0] for part in sampled))
            draws = leaves & (own["logits_indices"][..., 0] >= 0) & (own["query_lens"] > last.decode_step)
            mine = jnp.where(leaves, jnp.minimum(last.micro_batch, of - 1), of)
            by_part = state.tokens[:, :seq_slots].reshape(ranks, of, -1)
            old = split_rows(state.tokens[:, :seq_slots], last.micro_batch, of)
            by_part = by_part.at[:, mine].set(jnp.where(draws, sampled.tokens, old), mode="drop")
            last_tokens = jax.lax.dynamic_update_slice(state.tokens, by_part.reshape(ranks, seq_slots), (0, 0))
            state = EngineState(
                placement.constrain(last_tokens, "batch", "unsharded"), forward_state.kv_cache, token_pages
            )
            room = tuple(
                all.at[last.decode_step, :, mine].set(one, mode="drop") for all, one in zip(room, sampled, strict=True)
            )
            return state, forward_state.tokens_per_expert, buffers, room

        buffers = model.empty_buffers(schedule, ranks * seq_slots // of, 1) if schedule.stages > 1 else None
        room = output_buffers(max_decode_steps, ranks, of, seq_slots, vocab_size=self.config.vocab_size)
        carry = (state, tokens_per_expert, buffers, room)
        state, tokens_per_expert, _, room = jax.lax.fori_loop(0, schedule.ticks(decode_steps), tick, carry)
        sampled = SamplerOutput(*(part.reshape(max_decode_steps, ranks, seq_slots, *part.shape[4:]) for part in room))
        return state, for_every_process(StepOutput(sampled, tokens_per_expert), self.placement)

    def _sample_hidden(
        self, model: TransformerModel, hidden: jax.Array, metadata, token_pages: jax.Array, positions: jax.Array,
        features: SamplingFeatures,
    ) -> SamplerOutput:  # fmt: skip
        """Sample K tokens per row after hidden states [r*d*K,1,D] of tokens at positions [r,d,K]."""
        logits = model.logits(hidden)
        logits = logits.reshape(*positions.shape, -1)[..., : self.config.vocab_size]
        return sample_logits(
            logits, metadata, token_pages, positions + 1, features,
            placement=self.placement, backend=self.kernels.sampling,
        )  # fmt: skip

    def _score(self, leaves, tokens, lengths):
        rows_of_rank = tokens.shape[0] // self.num_ranks // self.context_ranks
        schedule = self._schedule(math.gcd(rows_of_rank, self.placement.num_stages))
        return score_prompts(self._merge(leaves), tokens, lengths, schedule=schedule)

    # --- called by the engine ---

    def _precisely(self):
        return jax.default_matmul_precision(self._precision) if self._precision else nullcontext()

    def empty_state(self, max_num_seqs: int, num_pages: int, page_size: int) -> EngineState:
        """Allocate zeroed slots and pages of every rank. Raises: RequestError if the devices have too little memory."""
        try:
            return jax.block_until_ready(self._empty_fn(max_num_seqs, num_pages, page_size))
        except (jax.errors.JaxRuntimeError, OverflowError) as error:
            gib = self.bytes_per_token * num_pages * page_size * self.num_ranks / 2**30
            raise RequestError(
                f"{num_pages} pages of {page_size} tokens take {gib:.1f} GiB over {self.placement.mesh.size} "
                f"device(s), which have too little free memory: lower max_tokens or max_num_seqs"
            ) from error

    def step(
        self, state: EngineState, packed: np.ndarray, features: tuple[bool, bool, bool], bucket: StepBucket,
        *, decode_steps: int, max_decode_steps: int, traced: bool = False, token_bitmask: np.ndarray | None = None,
    ) -> tuple[EngineState, StepOutput]:  # fmt: skip
        """Run one engine step and return the new state and the output. Donates state.

        features: whether any row samples at random, adjusts logits, or returns top log-probabilities. decode_steps: at
        most max_decode_steps, which is 1 in a step with prompt blocks. traced: whether to count tokens per expert.
        token_bitmask [r,d,K,W]: the tokens that may be sampled; None allows all and transfers nothing.
        """
        with self._precisely():
            arrays = self.put(packed, "batch", "unsharded"), self._put_bitmask(token_bitmask, bucket)
            flags = np.array((*features, token_bitmask is not None), np.bool_)
            static: Any = dict(bucket=bucket, max_decode_steps=max_decode_steps, traced=traced)
            with self._leaves_lock:
                return self.step_fn(self.leaves, state, *arrays, flags, np.int32(decode_steps), **static)

    def _put_bitmask(self, token_bitmask: np.ndarray | None, bucket: StepBucket) -> jax.Array:
        """Put a token bitmask on the mesh. For None, return an array that allows all tokens, which stays there."""
        if token_bitmask is not None:
            return self.put(token_bitmask, *_BITMASK_DIMS)
        shape = bucket.bitmask_shape(self.num_ranks, self.config.vocab_size)
        if shape not in self._all_allowed:
            self._all_allowed[shape] = self.put(np.full(shape, -1, np.int32), *_BITMASK_DIMS)
        return self._all_allowed[shape]

    def place_experts(self, wanted: ExpertPlacement) -> None:
        """Move experts to the wanted placement, for all steps dispatched from now on. Raises: as ExpertManager.move."""
        with self._leaves_lock:
            self.experts.move(self.leaves, wanted)

    def abstract_state(self, max_num_seqs: int, num_pages: int, page_size: int) -> EngineState:
        """Return the shapes, dtypes and shardings of empty_state, without allocating."""
        shapes = jax.eval_shape(lambda: self._empty(max_num_seqs, num_pages, page_size))
        as_struct = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(as_struct, shapes, self._state_sharding())

    def lower(self, state: EngineState, bucket: StepBucket, *, max_decode_steps: int) -> Any:
        """Lower the step of one bucket for the devices of the mesh, without running it."""
        bitmask_shape = bucket.bitmask_shape(self.num_ranks, self.config.vocab_size)
        shapes = ((self.num_ranks, bucket.length), ("batch", "unsharded")), (bitmask_shape, _BITMASK_DIMS)
        lie = self.placement.sharding
        arrays = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lie(*dims)) for shape, dims in shapes]
        flags, decode_steps = np.zeros(4, np.bool_), np.int32(1)  # host values, as `step` passes them
        static: Any = dict(bucket=bucket, max_decode_steps=max_decode_steps, traced=False)
        with self._precisely():
            return self.step_fn.lower(self.leaves, state, *arrays, flags, decode_steps, **static)

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Return the log-probability [B,S] of the token after each position of tokens [B,S], and the last logits [B,V].

        lengths [B]: valid tokens of each row; the last logits follow the last of them.
        """
        with self._precisely(), self._leaves_lock:
            return self.score_fn(self.leaves, self.put(tokens, "batch", "length"), self.put(lengths, "batch"))

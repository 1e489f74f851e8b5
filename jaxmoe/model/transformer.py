"""The forward pass of the model. The placement decides shardings, the caller decides how keys are cached."""

# Dims: B batch, S length, D width, V vocabulary (padded), E experts; r ranks of the batch.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.parameters import outer_parameters
from jaxmoe.model.attend import micro_batch_of
from jaxmoe.model.attention import ForwardContext, LayerInputs, StepInputs
from jaxmoe.model.block import DecoderLayer
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.moe import RouterOutput
from jaxmoe.model.params import Matrix, ParamFactory
from jaxmoe.model.pipeline import StageBuffers, empty_buffers, from_last_stage, run_ticks, tick_stages
from jaxmoe.model.project import project, reduce_or_scatter
from jaxmoe.model.rows import HIDDEN, hidden_dims, make_token_mask, rms_norm
from jaxmoe.ops.pointwise import inverse_frequencies, rotation
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim, array_sizes
from jaxmoe.parallel.stages import LayerSegment, PipelineSchedule, layer_segments

LayerCaches = list[tuple[Any, ...]]  # KV cache by segment and block
# Selects rows of [B,S,D], given the placement and the logical dim of its token rows.
Pick = Callable[[jax.Array, MeshPlacement, Any], jax.Array]
TokensPerExpert = list[
    tuple[jax.Array | None, ...]
]  # tokens of each rank routed to each physical expert [slots,n,R], if counted


class ForwardState(NamedTuple):
    """Hold the model state threaded through a step.

    It is the KV cache, and the tokens per expert so far if they are counted.
    """

    kv_cache: LayerCaches
    tokens_per_expert: TokensPerExpert | None


class TransformerModel(nnx.Module):
    """Compute a decoder-only transformer of any supported family. It has no head if the embedding is the head."""

    embed: nnx.Param
    final_norm: nnx.Param
    head: Matrix

    def __init__(
        self,
        config: ModelConfig,
        placement: MeshPlacement,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        kernels: KernelConfig = KernelConfig(),
    ) -> None:
        if config.indexer is not None:
            raise ConfigError(
                f"family {config.family!r} selects index_topk={config.indexer.top_k} tokens by an attention "
                f"indexer, which is not supported: size the model with jaxmoe info, or run deepseek_v3"
            )
        params = ParamFactory(rngs, jnp.dtype(dtype))
        self.config, self.placement, self.kernels = config, placement, kernels
        self.outside = placement.with_view("outside_pipeline")
        embedding, *last = outer_parameters(config, array_sizes(config, self.outside))
        params.create(self, [embedding])
        self.layer_segments = layer_segments(
            config, kernels.layers, stages=placement.num_stages, virtual_stages=placement.virtual_stages
        )
        self.segments = nnx.List(
            nnx.List(self._block(segment, block, params) for block in range(segment.period))
            for segment in self.layer_segments
        )
        params.create(self, last)

    def _block(self, segment: LayerSegment, block: int, params: ParamFactory) -> DecoderLayer:
        placement = self.placement.for_layers(segment)
        sizes = array_sizes(self.config, placement)
        params = params.stacked(segment, block, self.config, placement)
        return DecoderLayer(self.config, sizes, placement, self.kernels, segment.first + block, params=params)

    def __call__(
        self,
        tokens: jax.Array,
        step_inputs: StepInputs,
        forward_state: ForwardState | None = None,
        *,
        schedule: PipelineSchedule = PipelineSchedule(),
        pick: Pick | None = None,
        probabilities: bool = False,
    ) -> tuple[jax.Array, ForwardState, list[jax.Array]]:
        """Run tokens [B,S] through embedding, layers and final norm.

        Return the normed hidden states [B,S,D] of all tokens, or of those that pick selects; the new state; and the
        router probabilities [B,S,E] of each MoE layer if `probabilities` and the model has no pipeline.

        Within every rank, tokens are ordered by micro-batch of the schedule. forward_state: not needed if nothing is
        cached.
        """
        forward_state = self.empty_forward_state() if forward_state is None else forward_state
        routed: list[jax.Array] = []
        if self.placement.num_stages == 1:
            layer_inputs, routed_scores = step_inputs.part(0, 1), routed if probabilities else None
            x, forward_state = self._run_segments(
                0, len(self.layer_segments), self.embedded(tokens), layer_inputs, forward_state, routed_scores
            )
            x = x if pick is None else pick(x, self.outside, self.outside.token_dim(tokens.shape[0]))
        else:
            x, forward_state = self._through_stages(
                self.embedded(tokens, one_micro_batch=False), step_inputs, forward_state, schedule, pick
            )
        return self.apply_final_norm(x), forward_state, routed

    def empty_forward_state(self) -> ForwardState:
        """Return a state for attention without a KV cache."""
        return ForwardState([(None,) * segment.period for segment in self.layer_segments], None)

    def embedded(self, tokens: jax.Array, *, one_micro_batch: bool = True) -> jax.Array:
        """Embed tokens [B,S] -> [B,S,D].

        Rows are sharded as between layers, or as "batch" if a pipeline splits them into micro-batches. one_micro_batch:
        whether the tokens are a single micro-batch.
        """
        placement, table = self.outside, self.embed[...]
        between = placement.token_dim(tokens.shape[0])
        apart = placement.num_stages > 1 and not (one_micro_batch and placement.sequence_gather_axes(between))
        token_dim: TokenDim | Literal["batch"] = "batch" if apart else between
        axes = tuple(axis for axis in placement.axes("vocab") if placement.mesh.shape[axis] > 1)
        if token_dim == "token" or not axes:
            tokens = placement.constrain(tokens, token_dim, "length")
            return placement.constrain(jnp.take(table, tokens, axis=0), *hidden_dims(token_dim))
        scatter_axes = placement.sequence_gather_axes(token_dim) if token_dim == "sequence_sharded" else ()

        def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
            here = tokens - jax.lax.axis_index(axes) * len(table)
            here = jnp.where((here >= 0) & (here < len(table)), here, len(table))
            rows = table.at[here].get(mode="fill", fill_value=0)
            return reduce_or_scatter(rows, axes, scatter_axes)

        arrays = (table, ("vocab", "width")), (tokens, ("token" if scatter_axes else token_dim, "length"))
        return placement.shard_map_local(lookup, *arrays, out=hidden_dims(token_dim))

    def apply_final_norm(self, x: jax.Array) -> jax.Array:
        """Apply the final norm to x [B,S,D]. Rows of the result are sharded as "batch"."""
        x = self.outside.constrain(x, *HIDDEN)
        return rms_norm(
            x, self.final_norm[...], HIDDEN, self.outside, self.kernels.pointwise, eps=self.config.rms_norm_eps
        )

    # --- layers outside the pipeline: all layers if there is no pipeline ---

    @property
    def pipelined_segment(self) -> int:
        """Return the index of the segment that the stages share, or the number of segments without a pipeline."""
        return next(
            (n for n, segment in enumerate(self.layer_segments) if segment.stages > 1), len(self.layer_segments)
        )

    def before(
        self, x: jax.Array, layer_inputs: LayerInputs, forward_state: ForwardState
    ) -> tuple[jax.Array, ForwardState]:
        """Run x [B,S,D] through the layers before the pipelined segment."""
        return self._run_segments(0, self.pipelined_segment, x, layer_inputs, forward_state)

    def after(
        self, x: jax.Array, layer_inputs: LayerInputs, forward_state: ForwardState
    ) -> tuple[jax.Array, ForwardState]:
        """Run x [B,S,D] through the layers after the pipelined segment."""
        return self._run_segments(self.pipelined_segment + 1, len(self.layer_segments), x, layer_inputs, forward_state)

    def _run_segments(
        self,
        first: int,
        last: int,
        x: jax.Array,
        layer_inputs: LayerInputs,
        forward_state: ForwardState,
        routed: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, ForwardState]:
        if first >= last:
            return x, forward_state
        context = self._forward_context(layer_inputs, self.outside)
        x = self.outside.constrain(x, *hidden_dims(self.outside.token_dim(x.shape[0])))
        kv_cache: list[Any] = list(forward_state.kv_cache)
        tokens_per_expert: list[Any] | None = (
            None if forward_state.tokens_per_expert is None else list(forward_state.tokens_per_expert)
        )
        for number in range(first, last):
            segment, blocks = self.layer_segments[number], self.segments[number]

            def repeat(carry, layer, blocks=blocks, with_scores=routed is not None):
                x, kv_cache, tokens_per_expert, choices = _through(blocks, context, layer, *carry)
                scores = [choice.probabilities for choice in choices if choice is not None] if with_scores else None
                return (x, kv_cache, tokens_per_expert), scores

            carry = x, kv_cache[number], None if tokens_per_expert is None else tokens_per_expert[number]
            if segment.repeats == 1:
                carry, scores = repeat(carry, 0)
                scores = [] if scores is None else scores
            else:
                carry, stacked = jax.lax.scan(repeat, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
                scores = [one[index] for index in range(segment.repeats) for one in stacked or ()]
            if routed is not None:
                routed += scores
            x, kv_cache[number] = carry[:2]
            if tokens_per_expert is not None:
                tokens_per_expert[number] = carry[2]
        return x, ForwardState(kv_cache, tokens_per_expert)

    def _forward_context(self, layer_inputs: LayerInputs, placement: MeshPlacement) -> ForwardContext:
        positions, valid = (
            placement.constrain(array, "batch", "length") for array in (layer_inputs.positions, layer_inputs.valid)
        )
        rope = self.config.rope
        frequencies = inverse_frequencies(rope, self.config.rotary_dims)
        cos, sin = rotation(positions, frequencies, rope.attention_factor)
        token_mask = make_token_mask(valid, positions, placement, count=self.kernels.linear == "native")
        return ForwardContext(cos, sin, token_mask, layer_inputs.attention_backend)

    # --- stages of a pipeline ---

    def empty_buffers(self, schedule: PipelineSchedule, rows: int, length: int) -> StageBuffers:
        """Return zeroed buffers between stages. rows, length: of one micro-batch."""
        shape = rows, length, self.config.hidden_size
        token_dim = self.placement.token_dim(rows)
        return empty_buffers(schedule, shape, self.embed[...].dtype, self.placement, hidden_dims(token_dim))

    def tick(
        self,
        buffers: StageBuffers,
        enters: jax.Array,
        step_inputs: StepInputs,
        forward_state: ForwardState,
        tick: Any,
        schedule: PipelineSchedule,
        decode_steps: Any = 1,
    ) -> tuple[StageBuffers, ForwardState]:
        """Run one tick of every stage.

        enters [B,S,D] is the input of the first stage. The output is buffers.sent of the last stage.
        """
        segment, number = self.layer_segments[self.pipelined_segment], self.pipelined_segment
        graph, weights = nnx.split(self.segments[number])
        placement = self.placement.for_layers(segment)
        dims = hidden_dims(placement.token_dim(enters.shape[0]))
        enters = self.placement.constrain(enters, *dims)
        kv_cache, tokens_per_expert = list(forward_state.kv_cache), forward_state.tokens_per_expert

        def through(weights, slot, layer_slots, filled, x, layer_state, step_inputs):
            blocks = nnx.merge(graph, weights)
            context = self._forward_context(
                step_inputs.part(slot.micro_batch, schedule.micro_batches, slot.decode_step, slot.valid), placement
            )

            def run_layer(carry, layer):
                new, *layer_state, _ = _through(blocks, context, layer, *carry)
                new = new if filled is None else jnp.where(layer - layer_slots[0] < filled, new, carry[0])
                return (new, *layer_state), None

            carry = (placement.constrain(x, *dims), *layer_state)
            carry = (
                run_layer(carry, layer_slots[0])[0]
                if len(layer_slots) == 1
                else jax.lax.scan(run_layer, carry, layer_slots)[0]
            )
            return carry[0], carry[1:]

        layer_state = kv_cache[number], None if tokens_per_expert is None else tokens_per_expert[number]
        buffers, (kv_cache[number], counts) = tick_stages(
            through,
            weights,
            buffers,
            enters,
            layer_state,
            step_inputs,
            tick,
            decode_steps,
            segment=segment,
            schedule=schedule,
            placement=self.placement,
        )
        return buffers, ForwardState(
            kv_cache,
            tokens_per_expert
            if tokens_per_expert is None
            else [*tokens_per_expert[:number], counts, *tokens_per_expert[number + 1 :]],
        )

    def from_last(self, sent: jax.Array) -> jax.Array:
        """Return the last stage's part of sent [P,B,S,D] on all stages: [B,S,D] with rows sharded as between layers."""
        in_stage = self.placement.with_view("in_stage")
        dims = hidden_dims(in_stage.token_dim(sent.shape[1]))
        return from_last_stage(sent, self.placement, lambda x: in_stage.constrain(x, *dims))

    def _through_stages(
        self,
        x: jax.Array,
        step_inputs: StepInputs,
        forward_state: ForwardState,
        schedule: PipelineSchedule,
        pick: Pick | None,
    ) -> tuple[jax.Array, ForwardState]:
        """Run all micro-batches x [B,S,D] once through all layers."""
        ranks, count = self.placement.num_shards("batch"), schedule.micro_batches
        rows = x.shape[0] // count
        after = self.pipelined_segment + 1 < len(self.layer_segments)

        def one_tick(tick, carry):
            buffers, forward_state, done = carry
            first, last = schedule.slot(tick, 0), schedule.slot(tick, schedule.stages - 1)
            enters = micro_batch_of(x, first.micro_batch, count, ranks)
            if self.pipelined_segment:
                layer_inputs = step_inputs.part(first.micro_batch, count, 0, first.valid & (first.virtual_stage == 0))
                enters, forward_state = self.before(enters, layer_inputs, forward_state)
            buffers, forward_state = self.tick(buffers, enters, step_inputs, forward_state, tick, schedule)
            leaves, y = last.valid & (last.virtual_stage == schedule.virtual_stages - 1), buffers.sent
            if after:
                layer_inputs = step_inputs.part(last.micro_batch, count, 0, leaves)
                y, forward_state = self.after(self.from_last(y), layer_inputs, forward_state)
            index = jnp.where(leaves, last.micro_batch, count)
            return buffers, forward_state, done.at[index].set(y, mode="drop")

        room = jnp.zeros((count, *(() if after else (schedule.stages,)), rows, *x.shape[1:]), x.dtype)
        token_dim = self.placement.token_dim(rows)
        dims = ("unsharded", *(() if after else ("stage",)), *hidden_dims(token_dim))
        carry = self.empty_buffers(schedule, rows, x.shape[1]), forward_state, self.placement.constrain(room, *dims)
        _, forward_state, done = run_ticks(one_tick, schedule.ticks(), carry, alone=len(self.layer_segments) == 1)

        placement = self.placement.with_view("outside_pipeline" if after else "in_stage")

        def in_order(done: jax.Array) -> jax.Array:
            done = placement.constrain(done, "unsharded", *HIDDEN)
            done = done.reshape(count, ranks, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
            done = placement.constrain(done, *HIDDEN)
            return done if pick is None else pick(done, placement, "batch")

        if after:
            return in_order(done), forward_state
        return from_last_stage(done.swapaxes(0, 1), self.placement, in_order), forward_state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits [B,S,V] of hidden states [B,S,D], in float32.

        They are sharded over the vocabulary. Padded columns are -inf.
        """
        how = self.outside, self.kernels.linear
        if self.config.tie_word_embeddings:
            logits = project(hidden, self.embed, *how, transposed=True, dtype="float32", token_dim="batch")
        else:
            logits = project(hidden, self.head, *how, dtype="float32", token_dim="batch")
        real = jnp.arange(logits.shape[-1]) < self.config.vocab_size
        return jnp.where(real, logits, -jnp.inf)


def at_rows(
    hidden: jax.Array, placement: MeshPlacement, token_dim: TokenDim | Literal["batch"], *, index: jax.Array
) -> jax.Array:
    """Return the rows at index [r,d] of each rank of the batch: hidden [r*t,1,D] -> [r*d,1,D].

    token_dim: logical dim of the rows of hidden. If ranks shard a batch rank's tokens, each contributes its own rows,
    by one all-reduce.
    """
    axes = placement.axes(token_dim)
    token_shard_axes = tuple(
        axis for axis in axes if axis not in placement.axes("batch") and placement.mesh.shape[axis] > 1
    )

    def pick(hidden: jax.Array, index: jax.Array) -> jax.Array:
        if not token_shard_axes:
            return hidden[index.reshape(-1)]
        here = index.reshape(-1) - jax.lax.axis_index(token_shard_axes) * len(hidden)
        here = jnp.where((here >= 0) & (here < len(hidden)), here, len(hidden))
        return jax.lax.psum(hidden.at[here].get(mode="fill", fill_value=0), token_shard_axes)

    return placement.shard_map_local(pick, (hidden, hidden_dims(token_dim)), (index, ("batch", "block")), out=HIDDEN)


def _through(
    blocks: Sequence[DecoderLayer],
    context: ForwardContext,
    layer: Any,
    x: jax.Array,
    kv_cache: Sequence[Any],
    tokens_per_expert: Sequence[Any] | None,
) -> tuple[jax.Array, tuple[Any, ...], tuple[Any, ...] | None, list[RouterOutput | None]]:
    """Apply one repetition of a layer segment to x [B,S,D], with the weights at index `layer`."""
    new_kv_cache, new_counts, choices = [], [], []
    for number, block in enumerate(blocks):
        x, own, choice = block(x, layer, context, kv_cache[number])
        new_kv_cache.append(own)
        choices.append(choice)
        if tokens_per_expert is not None:
            counts = tokens_per_expert[number]
            new_counts.append(counts if choice is None else counts.at[layer].add(choice.tokens_per_expert))
    return x, tuple(new_kv_cache), None if tokens_per_expert is None else tuple(new_counts), choices


def abstract_model(
    config: ModelConfig, placement: MeshPlacement, *, dtype: str, kernels: KernelConfig = KernelConfig()
) -> TransformerModel:
    """Return the model without arrays: shape, dtype and logical dims of every parameter, for other modules to read."""
    return nnx.eval_shape(lambda: TransformerModel(config, placement, dtype=dtype, rngs=nnx.Rngs(0), kernels=kernels))

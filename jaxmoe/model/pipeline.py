"""One tick of a pipeline. Every stage runs the previous stage's output through one virtual stage of its layers.

A shard_map is manual over the pipeline axis only. Inside a stage, XLA shards arrays over tensor and batch as usual, and
the MoE layer is manual over the remaining axes.
"""

# Dims: P stages, M micro-batches, B token rows of one micro-batch, S length, D width.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.parallel.sharding import Dims, MeshPlacement
from jaxmoe.parallel.stages import LayerSegment, PipelineSchedule, PipelineSlot

STAGE = "pipeline"


class StageBuffers(NamedTuple):
    """Hold hidden states between stages.

    sent [P,B,S,D]: the last output of each stage. waiting [P,M,B,S,D]: outputs of the last stage that wait in the first
    stage for its next virtual stage. M is 0 if stages have one virtual stage.
    """

    sent: jax.Array
    waiting: jax.Array


def empty_buffers(
    schedule: PipelineSchedule, shape: tuple[int, ...], dtype: Any, placement: MeshPlacement, dims: Dims
) -> StageBuffers:
    """Return zeroed stage buffers. shape [B,S,D], dims: of one micro-batch."""
    rooms = schedule.micro_batches if schedule.virtual_stages > 1 else 0
    sent = jnp.zeros((schedule.stages, *shape), dtype)
    waiting = jnp.zeros((schedule.stages, rooms, *shape), dtype)
    return StageBuffers(
        placement.constrain(sent, "stage", *dims), placement.constrain(waiting, "stage", "unsharded", *dims)
    )


# Runs one micro-batch through one virtual stage: (weights, pipeline slot, layer slots, number of filled ones or None
# for all, x, layer state, step inputs) -> x, layer state.
Through = Callable[[Any, PipelineSlot, jax.Array, jax.Array | None, jax.Array, Any, Any], tuple[jax.Array, Any]]


def tick_stages(
    through: Through, weights: Any, buffers: StageBuffers, enters: jax.Array, layer_state: Any, step_inputs: Any,
    tick: Any, decode_steps: Any, *, segment: LayerSegment, schedule: PipelineSchedule, placement: MeshPlacement,
) -> tuple[StageBuffers, Any]:  # fmt: skip
    """Run one tick of all stages. Their outputs are `sent` of the returned buffers.

    weights, layer_state: trees of arrays with a leading dim of slots. enters [B,S,D]: input of the first stage's first
    virtual stage. step_inputs: a tree of arrays that every stage receives. tick: if it is a Python int, only valid
    micro-batches are sent between stages; otherwise idle stages send, too.
    """

    def stage(weights, buffers, enters, layer_state, step_inputs, tick, decode_steps):
        stage_index = jax.lax.axis_index(STAGE)
        slot = schedule.slot(tick, stage_index, decode_steps)
        came, waiting = _sent_on(buffers.sent[0], pairs), buffers.waiting
        if schedule.virtual_stages > 1:
            back = schedule.slot(tick - 1, schedule.stages - 1, decode_steps).micro_batch
            waiting = waiting.at[0, back].set(came, mode="drop")
            mine = jnp.minimum(slot.micro_batch, schedule.micro_batches - 1)
            enters = jnp.where(
                slot.virtual_stage == 0, enters, jax.lax.dynamic_index_in_dim(waiting[0], mine, keepdims=False)
            )
        x = jnp.where(stage_index == 0, enters, came)
        virtual_stage = jnp.where(slot.valid, slot.virtual_stage, 0)
        layer_slots = virtual_stage * segment.virtual_stage_slots + jnp.arange(
            segment.virtual_stage_slots, dtype=jnp.int32
        )
        even = segment.repeats == segment.slots
        x, layer_state = through(
            weights,
            slot,
            layer_slots,
            None if even else segment.filled(stage_index, virtual_stage),
            x,
            layer_state,
            step_inputs,
        )
        return StageBuffers(x[None], waiting), layer_state

    ring = [(stage_index, (stage_index + 1) % schedule.stages) for stage_index in range(schedule.stages)]
    ring = ring if schedule.virtual_stages > 1 else ring[:-1]
    pairs = schedule.sends(tick, decode_steps) if isinstance(tick, int) else ring
    staged, same = P(STAGE), P()
    region = jax.shard_map(
        stage,
        mesh=placement.mesh,
        axis_names={STAGE},
        in_specs=(staged, staged, same, staged, same, same, same),
        out_specs=(staged, staged),
        check_vma=False,
    )
    return region(weights, buffers, enters, layer_state, step_inputs, jnp.int32(tick), jnp.int32(decode_steps))


def _sent_on(x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
    return jax.lax.ppermute(x, STAGE, pairs) if pairs else x


def from_last_stage(
    x: jax.Array, placement: MeshPlacement, pick: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """Return pick(x) [...] of the last stage's x [P,...] on every stage, by one all-reduce over the pipeline."""

    def stage(x):
        last = jax.lax.axis_index(STAGE) == placement.num_stages - 1
        picked = pick(x[0])
        return _sum_of_one(jnp.where(last, picked, jnp.zeros_like(picked)))

    return jax.shard_map(
        stage, mesh=placement.mesh, axis_names={STAGE}, in_specs=(P(STAGE),), out_specs=P(), check_vma=False
    )(x)


def _sum_of_one(x: jax.Array) -> jax.Array:
    """Sum x over stages, of which all but one give zeros.

    Pairs of 16-bit numbers are sent as 32-bit integers: XLA's CPU compiler aborts on sums of bfloat16 if only some axes
    are manual.
    """
    if x.dtype.itemsize != 2:
        return jax.lax.psum(x, STAGE)
    if x.shape[-1] % 2:
        return jax.lax.psum(x.astype(jnp.float32), STAGE).astype(x.dtype)
    pairs = jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(jax.lax.psum(pairs, STAGE), x.dtype).reshape(x.shape)


def run_ticks(tick: Callable[[Any, Any], Any], ticks: int, carry: Any, *, alone: bool) -> Any:
    """Run tick(number, carry) for all ticks and return the last carry.

    alone: whether a tick consists of the stages only.
    """
    if PipelineSchedule.unrolled(ticks, alone=alone):
        for number in range(ticks):
            carry = tick(number, carry)
        return carry
    return jax.lax.fori_loop(0, ticks, tick, carry)

"""Compile a step ahead of time, without arrays, and report its memory and collectives."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.aot.hlo_collectives import collectives_and_padding
from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import StepBucket, bucket_with, whole_blocks
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.step_programs import EngineState
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.weights.params import parameter_table, state_of

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Describe one compiled step. Bytes are per device.

    total_bytes: memory during the step: weights and KV cache (held_bytes), the small step inputs, and temp_bytes.
    temp_bytes: temporary buffers. collectives, planned: compiled and planned collectives, and how often each runs per
    decode step, or per tick if a pipeline decodes. scatter_padding: bytes that the compiler adds to reduce-scatters, as
    a fraction of theirs. optimal_seconds: the compiler's estimate of a decode step or tick, or None if it gives none.
    """

    temp_bytes: int
    total_bytes: int
    collectives: Counter[CollectiveOp]
    planned: Counter[CollectiveOp]
    scatter_padding: float
    optimal_seconds: float | None
    compile_seconds: float


def abstract_runner(
    config: ModelConfig, placement: MeshPlacement, *, dtype: str, kv_dtype: str | None, kernels: KernelConfig
) -> ModelRunner:
    """Return a ModelRunner whose weights are abstract shapes with shardings: it can be compiled, but not run."""
    model = abstract_model(config, placement, dtype=dtype, kernels=kernels)
    graph, state = nnx.split(model)
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=info.sharding)
        for info in parameter_table(state, placement)
    ]
    return ModelRunner(nnx.merge(graph, state_of(state, shapes)), dtype=dtype, kv_dtype=kv_dtype)


def engine_state(
    runner: ModelRunner, *, max_num_seqs: int, context: int, page_size: int, chunk_tokens: int
) -> EngineState:
    """Return the abstract state of an engine with sequence slots for `max_num_seqs` requests.

    Its KV cache has pages for `context` tokens per request. If every layer has a window or attention chunk, it has only
    as many pages per request as one needs at once.
    """
    requests, seq_slots = -(-max_num_seqs // runner.num_ranks), runner.padded_num_seqs(max_num_seqs) // runner.num_ranks
    page_size *= runner.context_ranks
    chunk_tokens, block_tokens = whole_blocks(chunk_tokens, runner.block_shares)
    window, attention_chunk = runner.config.visible_span
    scheduler_config = SchedulerConfig(
        num_ranks=runner.num_ranks, max_num_seqs=seq_slots, chunk_tokens=chunk_tokens, block_tokens=block_tokens,
        num_pages=1,
        page_size=page_size, context=context, window=window, attention_chunk=attention_chunk,
    )  # fmt: skip
    return runner.abstract_state(seq_slots, requests * scheduler_config.max_pages(context), page_size)


def held_bytes(
    runner: ModelRunner, *, max_num_seqs: int, context: int, page_size: int, chunk_tokens: int
) -> tuple[int, int]:
    """Return bytes per device of the weights, and of the KV cache of `max_num_seqs` requests of `context` tokens."""
    state = engine_state(
        runner, max_num_seqs=max_num_seqs, context=context, page_size=page_size, chunk_tokens=chunk_tokens
    )
    weights, pages = (
        sum(map(_bytes_of_one_device, arrays)) for arrays in (runner.leaves, jax.tree.leaves(state.pages))
    )
    return weights, pages


def step_bucket(
    runner: ModelRunner, phase: Phase, *, max_num_seqs: int, context: int, page_size: int, chunk_tokens: int
) -> StepBucket:  # fmt: skip
    """Return the bucket (the shapes) of the step that compile_step compiles."""
    chunk_tokens, block_tokens = whole_blocks(chunk_tokens, runner.block_shares)
    blocks = chunk_tokens // block_tokens if phase == "prefill" else 0
    stages = runner.placement.num_stages
    return bucket_with(
        runner.padded_num_seqs(max_num_seqs) // runner.num_ranks, -(-blocks // stages) * stages,
        block_tokens=block_tokens,
        pages=-(-context // (page_size * runner.context_ranks)), stages=stages, shares=runner.context_ranks,
        whole=runner.placement.strip_tokens,
    )  # fmt: skip


def compile_step(
    runner: ModelRunner,
    phase: Phase,
    *,
    max_num_seqs: int,
    context: int,
    page_size: int,
    chunk_tokens: int,
    decode_steps: int,
) -> CompiledStep:
    """Compile one step of an engine with `max_num_seqs` requests of `context` tokens each, over all ranks.

    A decode step decodes up to decode_steps tokens per request. A prefill step decodes one token per request and
    computes chunk_tokens prompt tokens per rank.
    """
    state = engine_state(
        runner, max_num_seqs=max_num_seqs, context=context, page_size=page_size, chunk_tokens=chunk_tokens
    )
    bucket = step_bucket(
        runner, phase, max_num_seqs=max_num_seqs, context=context, page_size=page_size, chunk_tokens=chunk_tokens
    )  # fmt: skip
    decode_steps = 1 if bucket.blocks else decode_steps
    started = time.perf_counter()
    compiled = runner.lower(state, bucket, max_decode_steps=decode_steps).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    collectives, padding = collectives_and_padding(compiled.as_text(), runner.placement.mesh)
    return CompiledStep(
        temp_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        collectives=collectives, scatter_padding=padding,
        planned=runner.traffic.planned_program(bucket, max_decode_steps=decode_steps),
        optimal_seconds=cost.get("optimal_seconds"),
        compile_seconds=seconds,
    )  # fmt: skip


def collective_rows(phase: Phase, step: CompiledStep) -> list[dict[str, Any]]:
    """List every compiled or planned collective of a step with both counts, as --json prints them."""
    return [
        {"phase": phase, "op": one.op, "axes": list(one.axes), "count": step.collectives[one],
         "bytes": one.result_bytes,
         "planned": step.planned[one]}
        for one in sorted(step.collectives.keys() | step.planned.keys(), key=str)
    ]  # fmt: skip


def _bytes_of_one_device(array: Any) -> int:
    return int(np.prod(array.sharding.shard_shape(array.shape))) * jnp.dtype(array.dtype).itemsize

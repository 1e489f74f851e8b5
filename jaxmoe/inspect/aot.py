"""A step compiled ahead of time, without arrays: what it holds of memory and says to other devices."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.engine.batch import bucket_with
from jaxmoe.engine.runner import Runner
from jaxmoe.inspect.collectives import collectives
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.transformer import abstract_model
from jaxmoe.planner.traffic import Collective
from jaxmoe.sharding import Placement
from jaxmoe.weights.params import parameter_table, state_of

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler made of one step, in bytes of one device.

    weights and kv lie on the device all the time; temp is what the step needs besides; total is all of them, and the
    little that tells a step what to do. found and planned: the collectives, and how often each runs.
    optimal_seconds: the compiler's own estimate, where it gives one.
    """

    phase: Phase
    weights_bytes: int
    kv_bytes: int
    temp_bytes: int
    total_bytes: int
    found: Counter[Collective]
    planned: Counter[Collective]
    optimal_seconds: float | None
    compile_seconds: float


def abstract_runner(
    config: ModelConfig, placement: Placement, *, dtype: str, kv_dtype: str | None, kernels: Kernels
) -> Runner:
    """A Runner whose weights are shapes that lie on the placement's mesh; it can be compiled, not run."""
    model = abstract_model(config, placement, dtype=dtype, kernels=kernels)
    graph, state = nnx.split(model)
    shapes: list[Any] = [
        jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=info.sharding)
        for info in parameter_table(state, placement)
    ]
    return Runner(nnx.merge(graph, state_of(state, shapes)), dtype=dtype, kv_dtype=kv_dtype)


def _rows(runner: Runner, batch: int) -> int:
    stages = runner.placement.num_stages
    return max(runner.least_rows, -(-batch // (runner.num_ranks * stages)) * stages)


def held_bytes(runner: Runner, *, batch: int, context: int, page_size: int) -> tuple[int, int]:
    """Bytes of weights, and of keys and values of `batch` requests of `context` tokens each, on one device."""
    rows = _rows(runner, batch)
    state = runner.abstract_state(rows, rows * -(-context // page_size), page_size)
    weights, pages = (
        sum(map(_bytes_of_one_device, arrays)) for arrays in (runner.leaves, jax.tree.leaves(state.pages))
    )
    return weights, pages


def compile_step(
    runner: Runner, phase: Phase, *, batch: int, context: int, page_size: int, chunk_tokens: int, block_tokens: int
) -> CompiledStep:
    """One step of `batch` requests of `context` tokens each over all ranks: a turn of decoding, or chunk_tokens of
    prompts a rank beside it."""
    rows = _rows(runner, batch)
    pages = -(-context // page_size)
    blocks = chunk_tokens // block_tokens if phase == "prefill" else 0
    stages = runner.placement.num_stages
    bucket = bucket_with(
        rows, -(-blocks // stages) * stages, block_tokens=block_tokens, pages=pages, stages=stages
    )
    state = runner.abstract_state(rows, rows * pages, page_size)
    started = time.perf_counter()
    compiled = runner.lower(state, bucket, turns=1).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    mesh = runner.placement.mesh
    weights, kv = held_bytes(runner, batch=batch, context=context, page_size=page_size)
    return CompiledStep(
        phase=phase,
        weights_bytes=weights,
        kv_bytes=kv,
        temp_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        found=collectives(compiled.as_text(), mesh),
        planned=runner.planned(bucket),
        optimal_seconds=cost.get("optimal_seconds"),
        compile_seconds=seconds,
    )  # fmt: skip


def _bytes_of_one_device(array: Any) -> int:
    return int(np.prod(array.sharding.shard_shape(array.shape))) * jnp.dtype(array.dtype).itemsize

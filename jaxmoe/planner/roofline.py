"""Compute the roofline of a plan: FLOPs and bytes of each kind of op, for prefill and decode.

The counts are ideal: every weight and every cached token is read once, and every matrix reads its input activations
and writes its outputs. The inefficiencies of programs are part of the step estimate (cost.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxmoe.families.parameters import ParameterDeclaration
from jaxmoe.planner.cost import MATRICES, StepCost, attention_dims, experts_of, matrices_of
from jaxmoe.planner.memory import DeviceLayers
from jaxmoe.planner.parameters import shard_shape
from jaxmoe.planner.serving import RequestWorkload, ServingModel
from jaxmoe.planner.step_time import StepBatch


@dataclass(frozen=True)
class OpCost:
    """Hold the FLOPs and bytes of an op of one layer on one device, and the attainable FLOP/s in its dtype (rate)."""

    kind: str
    flops: float
    num_bytes: float
    rate: float

    @property
    def intensity(self) -> float:
        """Return the arithmetic intensity in FLOPs per byte."""
        return self.flops / self.num_bytes


def roofline(serving: ServingModel, workload: RequestWorkload, *, concurrency: int) -> dict[str, Any]:
    """Return the compute and memory roofs of a device, attainable and peak, and a point for each kind of op.

    The points are of a prefill step and of a decode step at the given concurrency. Their flops_per_s is the lower of
    the two roofs at their intensity.
    """
    cost, hardware = serving.cost, serving.cost.hardware
    rows = max(1.0, concurrency / serving.ranks)
    context = workload.isl + workload.osl / 2
    steps = {
        "prefill": StepBatch(0, min(serving.chunk_tokens, math.ceil(rows * workload.isl)), 0, workload.isl / 2),
        "decode": StepBatch(rows, 0, context),
    }
    return {
        "bytes_per_s": hardware.bytes_per_s,
        "flops_per_s": {name: hardware.flops_per_s(name) for name in hardware.tflops},
        "on_paper": {"bytes_per_s": hardware.hbm_gbps * 1e9,
                     "flops_per_s": {name: rate * 1e12 for name, rate in hardware.tflops.items()}},
        "points": [
            {"phase": phase, "op": op.kind, "flops_per_byte": op.intensity,
             "flops_per_s": min(op.rate, op.intensity * hardware.bytes_per_s)}
            for phase, step in steps.items() for op in op_costs(cost, step)
        ],
    }  # fmt: skip


def op_costs(cost: StepCost, batch: StepBatch) -> Iterator[OpCost]:
    """Yield each kind of op in a step of one data parallel rank once, for the first layer that has it."""
    seen: set[str] = set()
    stages = cost.num_stages
    each = StepBatch(batch.decode / stages, batch.prefill / stages, batch.context, batch.prompt)
    for block in cost.device_memory.blocks:
        for op in (*_dense(cost, block, each), *_attention(cost, block, each), *_experts(cost, block, each)):
            if op.kind not in seen and op.flops:
                seen.add(op.kind)
                yield op


def _numbers(params: list[ParameterDeclaration], block: DeviceLayers) -> float:
    return float(sum(math.prod(shard_shape(one, block.shards)) for one in params))


def _dense(cost: StepCost, block: DeviceLayers, batch: StepBatch) -> Iterator[OpCost]:
    """Yield the matrices that multiply every token."""
    width, item = cost.config.hidden_size, cost.device_memory.itemsize
    tokens = batch.tokens / block.placement.num_shards("page_token")
    for part in MATRICES:
        numbers = _numbers(matrices_of(block, part), block)
        if numbers:
            moved = tokens * (width + numbers / width) * item
            yield OpCost(part, 2 * numbers * tokens, block.bytes_of(part) + moved, cost.rate(part))


def _attention(cost: StepCost, block: DeviceLayers, batch: StepBatch) -> Iterator[OpCost]:
    """Yield attention of queries over the KV cache, or over their own prompt."""
    config = cost.config
    heads, decode, prefill = attention_dims(config, block)
    most = min(config.sliding_windows[block.layer] or math.inf, config.chunk(block.layer) or math.inf)
    ranks = block.placement.num_shards("page_token")
    met = batch.decode * min(batch.context, most) + batch.prefill * min(batch.prompt, most)
    dims = decode if batch.decode else prefill
    if batch.decode:
        num_bytes = batch.decode * min(batch.context, most) * cost.device_memory.kv_bytes(block)
    else:
        num_bytes = batch.prefill * heads * 2 * dims * cost.device_memory.itemsize
    yield OpCost("attention over tokens", 2 * heads * dims * met / ranks, num_bytes / ranks, cost.rate("router"))


def _experts(cost: StepCost, block: DeviceLayers, batch: StepBatch) -> Iterator[OpCost]:
    """Yield the routed experts at the mean load of a rank."""
    moe, placement = cost.config.moe, block.placement
    if moe is None or not cost.config.moe_layers[block.layer]:
        return
    num_experts, matrices = experts_of(block)
    numbers = _numbers(matrices, block) / num_experts
    tokens = batch.tokens * placement.size(placement.ep_exchange_axes("token")) / placement.num_shards("page_token")
    chosen = tokens * moe.num_experts_per_tok / block.shards.moe_expert
    active = num_experts * (1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** tokens)
    moved = chosen * (cost.config.hidden_size + numbers / cost.config.hidden_size) * cost.device_memory.itemsize
    num_bytes = active * block.bytes_of("experts") / num_experts + moved
    yield OpCost("experts", 2 * numbers * chosen, num_bytes, cost.rate("experts"))

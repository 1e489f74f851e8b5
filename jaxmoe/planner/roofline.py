"""The roofline of a plan: products of each kind of work against the bytes it moves, of prompts and of decoding.

Work is counted as it would be with nothing done twice: every weight met is read once, every cached token once, the
activations that go into a matrix and come out of it. What programs lose beside that is in the price (cost.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxmoe.planner.cost import MATRICES, StepBatch, StepCost, attention_dims, experts_of, matrices_of
from jaxmoe.planner.memory import Block
from jaxmoe.planner.parameters import Parameter
from jaxmoe.planner.serving import ServingModel, Workload


@dataclass(frozen=True)
class Work:
    """Of one device and layer: products, bytes, and the products a second that the hardware attains in its dtype."""

    kind: str
    flops: float
    num_bytes: float
    rate: float

    @property
    def intensity(self) -> float:
        """Products a byte."""
        return self.flops / self.num_bytes


def roofline(serving: ServingModel, workload: Workload, *, concurrency: int) -> dict[str, Any]:
    """Both roofs of a device, as attained and as on paper, and a point for each kind of work of a step of prompts and
    of a step that decodes so many requests, whose products a second are what the lower roof lets it attain."""
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
            {"phase": phase, "work": work.kind, "flops_per_byte": work.intensity,
             "flops_per_s": min(work.rate, work.intensity * hardware.bytes_per_s)}
            for phase, step in steps.items() for work in works(cost, step)
        ],
    }  # fmt: skip


def works(cost: StepCost, batch: StepBatch) -> Iterator[Work]:
    """Each kind of work of a step of one rank of the batch, once: of the first layer that has such."""
    seen: set[str] = set()
    stages = cost.num_stages
    each = StepBatch(batch.decode / stages, batch.prefill / stages, batch.context, batch.prompt)
    for block in cost.held.blocks:
        for work in (*_dense(cost, block, each), *_attention(cost, block, each), *_experts(cost, block, each)):
            if work.kind not in seen and work.flops:
                seen.add(work.kind)
                yield work


def _numbers(params: list[Parameter], block: Block) -> float:
    return float(sum(math.prod(one.share(block.split)) for one in params))


def _dense(cost: StepCost, block: Block, batch: StepBatch) -> Iterator[Work]:
    """Matrices that every token meets."""
    width, item = cost.config.hidden_size, cost.held.itemsize
    tokens = batch.tokens / block.placement.num_shards("page_token")
    for part in MATRICES:
        numbers = _numbers(matrices_of(block, part), block)
        if numbers:
            moved = tokens * (width + numbers / width) * item
            yield Work(part, 2 * numbers * tokens, block.bytes_of(part) + moved, cost.rate(part))


def _attention(cost: StepCost, block: Block, batch: StepBatch) -> Iterator[Work]:
    """Of queries over keys and values: those of pages, or a prompt's own."""
    config = cost.config
    heads, decode, prefill = attention_dims(config, block)
    most = min(config.sliding_windows[block.layer] or math.inf, config.chunk(block.layer) or math.inf)
    ranks = block.placement.num_shards("page_token")
    met = batch.decode * min(batch.context, most) + batch.prefill * min(batch.prompt, most)
    dims = decode if batch.decode else prefill
    if batch.decode:
        num_bytes = batch.decode * min(batch.context, most) * cost.held.kv_bytes(block)
    else:
        num_bytes = batch.prefill * heads * 2 * dims * cost.held.itemsize
    yield Work("attention over tokens", 2 * heads * dims * met / ranks, num_bytes / ranks, cost.rate("router"))


def _experts(cost: StepCost, block: Block, batch: StepBatch) -> Iterator[Work]:
    """The experts that a mean rank's tokens choose."""
    moe, placement = cost.config.moe, block.placement
    if moe is None or not cost.config.moe_layers[block.layer]:
        return
    held, matrices = experts_of(block)
    numbers = _numbers(matrices, block) / held
    tokens = batch.tokens * placement.size(placement.ep_exchange_axes("token")) / placement.num_shards("page_token")
    chosen = tokens * moe.num_experts_per_tok / block.split.moe_expert
    active = held * (1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** tokens)
    moved = chosen * (cost.config.hidden_size + numbers / cost.config.hidden_size) * cost.held.itemsize
    num_bytes = active * block.bytes_of("experts") / held + moved
    yield Work("experts", 2 * numbers * chosen, num_bytes, cost.rate("experts"))

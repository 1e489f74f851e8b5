"""Estimate the time of a step: a roofline of every kind of layer, kernel launches, and collectives on their links.

No constant here is specific to a model. Constants of the hardware are in its hardware file. Constants of the programs
are below, with their sources; docs/planner.md compares the estimates with published measurements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.config.engine import MAX_DECODE_STEPS
from jaxmoe.families.parameters import ParameterDeclaration, Part
from jaxmoe.parallel.collectives import CollectiveOp, StepShape, planned_collectives
from jaxmoe.planner.hardware import HardwareSpec
from jaxmoe.planner.links import LinkModel, RankGroup, group_of
from jaxmoe.planner.memory import DeviceLayers, DeviceMemory
from jaxmoe.planner.parameters import shard_shape
from jaxmoe.planner.step_time import StepBatch, StepTime
from jaxmoe.quantization.formats import NVFP4

# Seconds per kernel launch inside a compiled step. cuda: ai-dynamo/aiconfigurator@095f58a5 adds 3 us to every pass over
# memory. rocm: chosen on rows of MI300X. tpu: an XLA program is one launch.
LAUNCH_SECONDS: Mapping[str, float] = {"cuda": 3e-6, "rocm": 7e-6, "tpu": 0.5e-6, "cpu": 2e-6}
# Kernels of each part of a layer, as tuned programs fuse them, and the additional ones of latent attention.
_KERNELS: Mapping[Part, int] = {"attention": 4, "dense_mlp": 3, "shared_expert": 2, "router": 2, "experts": 7}
_LATENT_KERNELS = 5
# The five constants marked "chosen" below were chosen together, on the calibration rows of docs/planner.md.
# Filling the pipeline and writing the output of a matmul takes as long as this many more inputs in bf16, so that narrow
# shards and dtypes of few bits attain less. Chosen.
_OUTPUT_PRODUCTS = 768
# Attained rate relative to other matmuls: 4-bit matmuls (vllm-project/vllm#20646 on B200: 3,904 of 9,000 TFLOPS, and
# 1,420 of 2,250 in bf16); 4-bit weights that the hardware has to unpack first (chosen).
_FOUR_BITS, _UNPACKED = 0.7, 0.5
# Grouped matmuls work on tiles of up to 128 rows, smaller if an expert has fewer; the last tile is taken as half full.
_TILE_ROWS, _MIN_TILE_ROWS = 128, 8
# Share of the memory bandwidth that reading many experts attains, relative to one matrix. Chosen.
_GROUPED_READS = 0.8
# Ranks with different tokens do not reach an all-to-all at the same time. They wait for a part of the layer's time that
# depends on tokens (chosen; reading weights takes all ranks the same time), and for each other's kernels (chosen;
# DeepEP's dispatch of 128 tokens among 8 H800 takes 77 us, its combine 114 us, mostly data transfer).
_UNEVEN, _WAIT_SECONDS = 0.5, 10e-6
# Expert loads without load balancing are proportional to (1 + index) ** -skew.
SKEW = 0.5
# Micro-batches per pipeline stage of a step with prompts; decode steps before the pipeline drains (engine/batch.py).
_MICRO_BATCHES = 4
MATRICES: tuple[Part, ...] = ("attention", "dense_mlp", "shared_expert", "router")
_RATES = {"int8": "int8", "float8_e4m3fn": "fp8", "mxfp4": "bf16"}
SILENT = "silent"  # a dispatch without collectives
_MANY = 1 << 14  # tokens for which collectives are planned once; bytes scale with tokens


@dataclass(frozen=True)
class _DenseCost:
    """Hold the cost of matrices that multiply every token.

    matmuls: seconds per token. num_bytes: weight bytes, read once per step. moved: activation bytes per token.
    """

    matmuls: float
    num_bytes: float
    moved: float
    kernels: int


@dataclass(frozen=True)
class _ExpertCost:
    """Hold the cost of the experts on one device.

    num_experts: experts on the device. matmuls, moved: seconds and activation bytes per token and expert. num_bytes:
    weight bytes of one expert. reach: number of ranks whose tokens the experts may receive. num_shards: number of
    devices that the experts are sharded over.
    """

    num_experts: int
    matmuls: float
    moved: float
    num_bytes: float
    reach: float
    num_shards: int


@dataclass(frozen=True)
class _LayerCost:
    """Hold the cost of the layers of one kind on one device."""

    count: int
    dense: tuple[_DenseCost, ...]
    experts: _ExpertCost | None
    decode_flops: float  # per decoding token and cached token it attends to
    prefill_flops: float
    exchanges: bool  # whether several ranks exchange tokens for its experts
    kv_bytes: float
    window: float
    chunk: float

    def seen(self, context: float) -> float:
        """Return the number of cached tokens that a query attends to."""
        return min(context, self.window, self.chunk)


class StepCost:
    """Estimate the step time of a model on a placement and hardware."""

    def __init__(
        self, device_memory: DeviceMemory, hardware: HardwareSpec, *, dispatch: str = "all_to_all", skew: float = SKEW
    ) -> None:
        self.device_memory, self.hardware, self.dispatch = device_memory, hardware, dispatch
        self.config, self.placement = device_memory.config, device_memory.placement
        self._shape = dict(self.placement.mesh.shape)
        self.links = LinkModel(hardware, devices=math.prod(self._shape.values()))
        self.num_stages = self.placement.num_stages
        self._launch = LAUNCH_SECONDS[hardware.platform]
        self._bandwidth = hardware.bytes_per_s
        self._plain_rate = hardware.flops_per_s("bf16")
        self._context_ranks = self.placement.num_shards("page_token")
        moe = self.config.moe
        ranks = max(block.placement.num_shards("moe_expert") for block in device_memory.blocks)
        self.skew, self._skew = imbalance(moe.num_experts, ranks, skew) if moe else 1.0, skew
        alike: dict[_LayerCost, int] = {}
        for block in device_memory.blocks:
            layer = self._layer(block)
            alike[layer] = alike.get(layer, 0) + block.num_layers
        self._layers = [replace(layer, count=count) for layer, count in alike.items()]
        decides = (*self._layers, moe, skew, self.skew, self._vocab, self._context_ranks, self.config.hidden_size)
        self._worked: dict[StepBatch, tuple[float, float, float, float]] = hardware.priced.setdefault(
            ("work", *decides, device_memory.itemsize), {}
        )
        self._said: dict[tuple[int, int], tuple[float, float]] = {}

    def dispatched(self, dispatch: str) -> StepCost:
        """Return a copy with another dispatch backend; SILENT has no collectives and so bounds all others."""
        other = copy(self)
        other.dispatch, other._said = dispatch, {}
        other.__dict__.pop("_planned", None)
        return other

    # --- Costs of layers, computed once per placement ---

    def rate(self, part: Part) -> float:
        """Return the FLOP/s of matmuls with a part's matrices, in their own dtype if the hardware supports it."""
        format = self.config.quantization.format if self.config.quantization else None
        if format is None or part == "router":
            return self._plain_rate
        attained = self.hardware.flops_per_s
        if format.dtype == "mxfp4" and "fp4" in self.hardware.tflops:  # with 4-bit or 8-bit activations
            return _FOUR_BITS * attained("fp4") if format == NVFP4 else attained("fp8")
        unpacked = format.dtype == "mxfp4" or _RATES[format.dtype] not in self.hardware.tflops
        return attained(_RATES[format.dtype]) * (_UNPACKED if unpacked else 1.0)

    def _layer(self, block: DeviceLayers) -> _LayerCost:
        config, placement = self.config, block.placement
        heads, decode, prefill = attention_dims(config, block)
        window, chunk = config.sliding_windows[block.layer], config.chunk(block.layer)
        return _LayerCost(
            count=0, dense=tuple(self._dense(block, part) for part in MATRICES if block.bytes_of(part)),
            experts=self._experts(block) if config.moe_layers[block.layer] else None,
            exchanges=config.moe_layers[block.layer] and placement.size(placement.ep_exchange_axes("token")) > 1,
            decode_flops=2 * heads * decode, prefill_flops=2 * heads * prefill,
            kv_bytes=self.device_memory.kv_bytes(block),
            window=math.inf if window is None else window, chunk=math.inf if chunk is None else chunk / 2,
        )  # fmt: skip

    def _dense(self, block: DeviceLayers, part: Part) -> _DenseCost:
        numbers, matmuls = self._matmuls(matrices_of(block, part), block)
        wide = numbers / self.config.hidden_size  # roughly the widths of inputs and outputs other than hidden_size
        moved = (6 * self.config.hidden_size + 2 * wide) * self.device_memory.itemsize
        kernels = _KERNELS[part] + _LATENT_KERNELS * (part == "attention" and self.config.mla is not None)
        return _DenseCost(matmuls, block.bytes_of(part), moved, kernels)

    def _matmuls(self, matrices: Sequence[ParameterDeclaration], block: DeviceLayers) -> tuple[int, float]:
        """Return the number of weights of matrices of one part, and the matmul seconds of one token with them.

        The seconds include the overhead of every output (_OUTPUT_PRODUCTS).
        """
        total, outputs = 0, 0
        for one in matrices:
            share = shard_shape(one, block.shards)
            numbers = math.prod(share)
            total += numbers
            if one.over:
                outputs += numbers // math.prod(share[one.lead : one.lead + one.over])
        rate = self.rate(matrices[0].part)
        return total, 2 * total / rate + 2 * _OUTPUT_PRODUCTS * outputs / self._plain_rate

    def _experts(self, block: DeviceLayers) -> _ExpertCost:
        placement, width = block.placement, self.config.hidden_size
        num_experts, matrices = experts_of(block)
        numbers, matmuls = (one / num_experts for one in self._matmuls(matrices, block))
        moved = (2 * width + 2 * numbers / width) * self.device_memory.itemsize
        reach = placement.size(placement.ep_exchange_axes("token")) / self._context_ranks
        return _ExpertCost(
            num_experts, matmuls, moved, block.bytes_of("experts") / num_experts, reach, block.shards.moe_expert
        )

    # --- Time of a step ---

    def step_time(self, batch: StepBatch) -> StepTime:
        """Return the time of an engine step with one decode step.

        In a pipeline the batch passes the stages in micro-batches, as in the engine: one per stage if all requests
        decode, with several decode steps before the pipeline drains; four per stage with prompts. The bubble is the
        time that stages are idle while the pipeline fills and drains.
        """
        stages, virtual_stages = self.num_stages, self.placement.virtual_stages
        groups = stages * (_MICRO_BATCHES if batch.prefill and stages > 1 else 1)
        groups = min(groups, max(1, int(batch.tokens)))  # no group is empty
        each = StepBatch(batch.decode / groups, batch.prefill / groups, batch.context, batch.prompt)
        link, out = self._collectives(_grain(each.tokens), _grain(max(each.decode, 1.0)))
        passes = max(1.0, groups / stages)  # of one group through all layers; fewer groups leave stages idle
        compute, memory, launch, waiting = (passes * one for one in self._work(each))
        link, out = passes * link, passes * out
        if self.dispatch != SILENT:
            link += waiting
        waits = (stages - 1) / (stages * virtual_stages * (1 if batch.prefill else MAX_DECODE_STEPS))
        bubble = (compute + memory + link + out + launch) / passes * waits
        return StepTime(compute, memory, link, out, launch, bubble)

    def _work(self, each: StepBatch) -> tuple[float, float, float, float]:
        """Return the seconds of one micro-batch through all layers: compute, memory, launches and waiting.

        Waiting is the time at an all-to-all until the slowest rank arrives.
        """
        if (known := self._worked.get(each)) is not None:
            return known
        times = [0.0, 0.0, 0.0, 0.0]  # compute, memory, launch; of these, the seconds that depend on tokens
        self._outside(each, times)
        waiting = 0.0
        for layer in self._layers:
            one = [0.0, 0.0, 0.0, 0.0]
            self._attend(layer, each, one)
            for dense in layer.dense:
                tokens = each.tokens / self._context_ranks
                self._pass(one, dense.matmuls * tokens, dense.num_bytes, dense.kernels)
                self._move(one, dense.moved * tokens)
            if layer.experts is not None:
                self._meet_experts(layer.experts, each, one)
            if layer.exchanges:
                waiting += layer.count * (_UNEVEN * one[3] + 2 * _WAIT_SECONDS)
            for at, seconds in enumerate(one):
                times[at] += layer.count * seconds
        self._worked[each] = times[0], times[1], times[2], waiting
        return self._worked[each]

    def _pass(self, times: list[float], compute: float, weights: float, kernels: int, *, pages: float = 0.0) -> None:
        """Add an op by a smooth roofline: the Euclidean norm of its compute time and memory time.

        weights, pages: bytes of weights and of KV cache pages that the op reads.
        """
        read = weights / self._bandwidth
        memory = read + pages / self._bandwidth
        seconds = math.hypot(compute, memory)
        times[compute <= memory] += seconds
        times[2] += kernels * self._launch
        times[3] += seconds - read

    def _move(self, times: list[float], num_bytes: float) -> None:
        """Add activation bytes between kernels: norms, quantization and others do not overlap with matmuls."""
        times[1] += num_bytes / self._bandwidth
        times[3] += num_bytes / self._bandwidth

    def _outside(self, batch: StepBatch, times: list[float]) -> None:
        """Add the embedding, the LM head and the logits of decoding requests."""
        width, item = self.config.hidden_size, self.device_memory.itemsize
        vocab = self._vocab
        moved = vocab * width * item + batch.decode * (vocab * 12 + width * item)
        self._pass(times, 2 * vocab * width * batch.decode / self._plain_rate, moved, 4)

    @cached_property
    def _vocab(self) -> float:
        return self.device_memory.outer[0][0].dims["vocab"] / self.placement.with_view("outside_pipeline").num_shards(
            "vocab"
        )

    def _attend(self, layer: _LayerCost, batch: StepBatch, times: list[float]) -> None:
        """Add attention of decoding requests over the KV cache, and of prompt tokens within their prompt."""
        met = batch.decode * layer.seen(batch.context) / self._context_ranks
        self._pass(times, met * layer.decode_flops / self._plain_rate, 0.0, 2, pages=met * layer.kv_bytes)
        if batch.prefill:
            met = batch.prefill * min(batch.prompt, layer.window, layer.chunk) / self._context_ranks
            self._pass(times, met * layer.prefill_flops / self._plain_rate, 0.0, 1)

    def _meet_experts(self, experts: _ExpertCost, batch: StepBatch, times: list[float]) -> None:
        """Add the experts of the most loaded rank: the tokens it receives and the experts that they activate."""
        moe = self.config.moe
        assert moe is not None
        tokens = batch.tokens * experts.reach
        chosen = tokens * moe.num_experts_per_tok / experts.num_shards * self.skew
        active = experts.num_experts * chosen_share(moe.num_experts, moe.num_experts_per_tok, self._skew, tokens)
        tile = min(_TILE_ROWS, max(_MIN_TILE_ROWS, chosen / max(active, 1e-9)))
        matmuls = experts.matmuls * (chosen + active * tile / 2)
        self._pass(times, matmuls, experts.num_bytes * active / _GROUPED_READS, _KERNELS["experts"])
        self._move(times, experts.moved * chosen)

    def _collectives(self, tokens: int, sampled: int) -> tuple[float, float]:
        """Return the collective seconds of one micro-batch, inside and between scale-up domains."""
        if self.dispatch == SILENT:
            return 0.0, 0.0
        seconds = self._said.get((tokens, sampled))
        if seconds is None:
            link_seconds = [0.0, 0.0]
            for one, group, count, of_tokens in self._planned:
                rows = tokens / _MANY if of_tokens else sampled
                scaled = CollectiveOp(op=one.op, axes=one.axes, result_bytes=math.ceil(one.result_bytes * rows))
                link_seconds[group.across > 1] += count * self.links.seconds(scaled, group)
            seconds = self._said[tokens, sampled] = link_seconds[0], link_seconds[1]
        return seconds

    @cached_property
    def _planned(self) -> list[tuple[CollectiveOp, RankGroup, int, bool]]:
        """Return (collective, group, count, scales_with_tokens) for _MANY tokens and for one sampled row."""
        return [*self._planned_for(_MANY * self._context_ranks, 0), *self._of_rows]

    @cached_property
    def _of_rows(self) -> list[tuple[CollectiveOp, RankGroup, int, bool]]:
        return self._planned_for(0, 1)

    def _planned_for(self, tokens: int, sampled: int) -> list[tuple[CollectiveOp, RankGroup, int, bool]]:
        def planned_of(sampled: int) -> Counter[CollectiveOp]:
            shape = StepShape(num_tokens=tokens, num_sampled=sampled, itemsize=self.device_memory.itemsize, picked=True)
            return planned_collectives(self.config, self.placement, shape, dispatch=self.dispatch)

        planned = planned_of(sampled)
        if not tokens:  # token counts are exchanged even for zero tokens; they are counted with the tokens
            planned -= planned_of(0)
        grouped = []
        for one, count in planned.items():
            if not one.result_bytes:
                continue
            group = group_of(one.axes, self._shape, self.hardware.scale_up_devices)
            if one.op == "ragged-all-to-all":  # the planned bytes are an upper bound
                one = replace(one, result_bytes=self._visited_bytes(group.ranks))
            grouped.append((one, group, count, bool(tokens)))
        return grouped

    def _visited_bytes(self, ranks: int) -> int:
        """Return the bytes of _MANY tokens, each sent once to every rank with one of its experts, chosen at random."""
        moe = self.config.moe
        assert moe is not None
        ranks = min(ranks, moe.num_experts)
        elsewhere = math.comb(moe.num_experts - moe.num_experts // ranks, moe.num_experts_per_tok)
        visited = ranks * (1 - elsewhere / math.comb(moe.num_experts, moe.num_experts_per_tok))
        return math.ceil(_MANY * visited * self.config.hidden_size * self.device_memory.itemsize)


def attention_dims(config: ModelConfig, block: DeviceLayers) -> tuple[int, int, int]:
    """Return (heads on a device, decode dims, prefill dims) of a layer.

    The dims are the multiply-adds per head for a query and a token it attends to: a cached token in decode, a token of
    the same prompt in prefill.
    """
    heads, mla = block.sizes.kv_slots // block.shards.kv_head * block.sizes.group_slots, config.mla
    if mla is None:
        return heads, 2 * config.head_dim, 2 * config.head_dim
    return heads, mla.cached_dim + mla.kv_lora_rank, config.head_dim + mla.v_head_dim


def matrices_of(block: DeviceLayers, part: Part) -> list[ParameterDeclaration]:
    """Return the matrices of a part that multiplies every token."""
    return [one for one, _ in block.params if one.part == part and len(one.dims) > 1]


def experts_of(block: DeviceLayers) -> tuple[int, list[ParameterDeclaration]]:
    """Return the number of a layer's experts on a device, and their matrices."""
    num_experts = block.sizes.moe_experts // block.shards.moe_expert
    return num_experts, [one for one, _ in block.params if one.part == "experts" and one.lead]


def _grain(value: float) -> int:
    """Round up to an integer on a grid with steps of about an eighth, so that nearby values share one estimate."""
    whole = max(1, math.ceil(value))
    step = 1 << max(0, whole.bit_length() - 4)
    return -(-whole // step) * step


def _loads(num_experts: int, skew: float) -> np.ndarray:
    return (1.0 + np.arange(num_experts)) ** -skew


@lru_cache(maxsize=1 << 16)
def chosen_share(num_experts: int, top_k: int, skew: float, tokens: float) -> float:
    """Return the share of experts that a number of tokens activates, with loads (1 + index) ** -skew."""
    loads = _loads(num_experts, skew)
    each = np.minimum(top_k * loads / loads.sum(), 1.0 - 1e-12)
    return float(1 - np.exp(tokens * np.log1p(-each)).mean())


@lru_cache(maxsize=1024)
def imbalance(num_experts: int, ranks: int, skew: float) -> float:
    """Return the load of the most loaded rank over the mean load, with expert loads (1 + index) ** -skew.

    Experts are assigned to ranks at random: the result is the mean over 32 assignments with a fixed seed.
    """
    if ranks <= 1 or skew == 0:
        return 1.0
    loads = _loads(num_experts, skew)
    room = -(-num_experts // ranks)
    padded = np.zeros(room * ranks)
    padded[:num_experts] = loads
    random = np.random.default_rng(0)
    fullest = [random.permutation(padded).reshape(ranks, room).sum(axis=1).max() for _ in range(32)]
    return float(np.mean(fullest) / (loads.sum() / ranks))

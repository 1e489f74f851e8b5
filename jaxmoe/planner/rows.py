"""Rows of `jaxmoe plan --json`: performance of a plan, memory of a device, and the options that run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.planner.choose import ServingPlan
from jaxmoe.planner.hardware import HardwareSpec
from jaxmoe.planner.pools import DisaggregatedPlan, beats
from jaxmoe.planner.sizes import count_parameters
from jaxmoe.planner.specs import SearchRequest, kind_of

_BITS = {"fp8": 8, "int8": 8, "mxfp4": 4, "nvfp4": 4}


def plan_row(plan: ServingPlan, hardware: HardwareSpec, config: ModelConfig) -> dict[str, Any]:
    """Return one plan with its predicted performance. tpot_ms is None if only one token is generated."""
    parallelism, estimate = plan.parallelism, plan.estimate
    dollars = hardware.dollars_per_hour
    return {
        "split": kind_of(parallelism, moe=config.moe is not None),
        "mesh": parallelism.mesh, "layout": str(parallelism.layout),
        "dispatch": parallelism.dispatch, "virtual_stages": parallelism.virtual_stages,
        "chunk_tokens": parallelism.chunk_tokens,
        "max_num_seqs": estimate.concurrency, "max_requests": plan.max_requests, "ttft_ms": estimate.ttft * 1e3,
        "tpot_ms": estimate.tpot * 1e3 if estimate.osl > 1 else None,
        "tokens_per_s_per_user": 1 / estimate.seconds_per_token,
        "tokens_per_s_per_device": plan.tokens_per_s / plan.devices, "tokens_per_s": plan.tokens_per_s,
        "step_ms": {name: value * 1e3 for name, value in estimate.mean_step.parts().items()},
        "dollars_per_million_tokens":
            None if dollars is None else plan.devices * dollars / 3600 / plan.tokens_per_s * 1e6,
    }  # fmt: skip


def memory_of(plan: ServingPlan, request: SearchRequest) -> dict[str, Any]:
    """Return the memory of one device in bytes.

    Weights are listed by part; padding and copies in them are summed. Pages hold the plan's requests at full length.
    The buffers of a step are listed by part; left is the rest. pool_tokens and max_requests: capacity of the KV cache
    over all devices.
    """
    memory, serving, estimate, limit = (
        plan.serving.device_memory,
        plan.serving,
        plan.estimate,
        request.hardware.hbm_bytes,
    )
    rows = max(1, -(-estimate.concurrency // serving.ranks))
    tokens_each = memory.config.cached_tokens(request.workload.isl + request.workload.osl, serving.chunk_tokens)
    pages = rows * tokens_each * memory.kv_bytes_per_token
    parts, tokens = serving.step_parts(rows), serving.pool_tokens(rows)
    return {
        "weights_by_part": dict(memory.weights_by_part), "weights": memory.weight_bytes,
        "padding_and_copies": memory.weight_bytes - memory.unpadded_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token, "tokens_per_request": tokens_each, "pages": pages,
        "step_by_part": parts,
        "step": sum(parts.values()), "left": limit - memory.weight_bytes - pages - sum(parts.values()),
        "limit": limit, "pool_tokens": int(tokens) * serving.ranks, "max_requests": plan.max_requests,
    }  # fmt: skip


def rule_of_thumb(config: ModelConfig, hardware: HardwareSpec) -> dict[str, Any]:
    """Estimate memory as bits / 8 x billions of parameters x 1.8 GB, and round up to a power of two of devices.

    bits: width of the dtype that most weights have.
    """
    kept = config.quantization
    bits = _BITS[kept.format.name] if kept else 32 if config.dtype == "float32" else 16
    billions = _rounded(count_parameters(config).total / 1e9)
    needed = _rounded(bits / 8 * billions * 1.8)
    devices = 1
    while devices * hardware.hbm_gb < needed:
        devices *= 2
    return {
        "bits": bits, "billions": billions, "gb": needed, "devices": devices, "devices_gb": devices * hardware.hbm_gb,
    }  # fmt: skip


def _rounded(number: float) -> float:
    """Round to a whole number from 1 on, and to three significant digits below."""
    return round(number) if number >= 1 else float(f"{number:.3g}")


def weights_dtype_of(config: ModelConfig) -> str:
    """Return the format of the weight matrices."""
    return config.quantization.format.name if config.quantization else config.dtype


def arguments_of(plan: ServingPlan, given: Mapping[str, str | None], *, ignored: Iterable[str] = ()) -> str:
    """Return the options that generate, inspect, compile and map all take.

    given: dtype options by name, None if not requested. ignored: keys of config.json to ignore.
    """
    parallelism, words = plan.parallelism, [f"--mesh {plan.parallelism.mesh}"]
    if str(parallelism.layout) != "ep-tp":
        words.append(f"--layout {parallelism.layout}")
    if parallelism.dispatch != "all_to_all":
        words.append(f"--dispatch {parallelism.dispatch}")
    if parallelism.virtual_stages > 1:
        words.append(f"--virtual-stages {parallelism.virtual_stages}")
    return " ".join([*words, *(f"--{name} {value}" for name, value in given.items() if value is not None),
                     *(f"--ignore-config-key {key}" for key in ignored)])  # fmt: skip


def engine_of(plan: ServingPlan, request: SearchRequest) -> dict[str, int]:
    """Return the other arguments of AsyncEngine. compile and map have options of the same names, generate has
    --max-num-seqs."""
    return {
        "max_num_seqs": plan.estimate.concurrency, "context": request.workload.isl + request.workload.osl,
        "chunk_tokens": plan.parallelism.chunk_tokens,
    }  # fmt: skip


def disaggregated_row(plan: DisaggregatedPlan, best: ServingPlan, request: SearchRequest) -> Mapping[str, Any]:
    """Return the plan of disaggregated prefill and decode, and whether it is better than the best plan."""
    return {
        "engine_devices": plan.engine_devices, "prefill_engines": plan.prefill_engines,
        "decode_engines": plan.decode_engines, "prefill_mesh": plan.prefill.mesh,
        "prefill_layout": str(plan.prefill.layout), "prefill_chunk_tokens": plan.prefill.chunk_tokens,
        "decode_mesh": plan.decode.mesh,
        "decode_layout": str(plan.decode.layout), "concurrency": plan.concurrency, "ttft_ms": plan.ttft * 1e3,
        "tpot_ms": plan.tpot * 1e3, "transfer_ms": plan.transfer * 1e3, "tokens_per_s": plan.tokens_per_s,
        "better": beats(plan, best, request),
    }  # fmt: skip

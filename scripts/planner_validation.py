"""Compare predictions with published measurements.

Each row of a CSV file has a model, hardware, a workload and the performance that a system reached. No constant is
fitted to a row.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families import FAMILIES, with_weights_dtype
from jaxmoe.families.quantization_reader import weight_quantization
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import check_axes
from jaxmoe.planner.choose import ServingPlan
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.hardware import HardwareSpec, hardware_names, read_hardware
from jaxmoe.planner.search import NoPlanError, search
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.sizes import ParameterCounts, count_parameters, kv_numbers
from jaxmoe.planner.specs import SearchRequest
from jaxmoe.planner.step_time import StepBatch
from jaxmoe.quantization.formats import FORMATS, NVFP4

COLUMNS = (
    "system", "model", "hardware", "num_gpus", "parallelism", "precision", "phase", "isl", "osl",
    "batch_or_concurrency", "metric", "value", "unit", "source",
)  # fmt: skip
# Held-out models and machines: no constant was chosen on their rows (docs/planner.md).
_HELD_OUT = {
    "model": ("Llama-3.1-405B", "gpt-oss-120b", "Qwen3-30B-A3B", "Mixtral-8x22B", "Kimi-K2-Instruct"),
    "hardware": ("GB200", "A100"),
}  # fmt: skip
_CHUNK_TOKENS = 8192  # per step, as serving systems set it in throughput benchmarks
_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4}
# Total requests in NVIDIA's tables of trtllm-bench, by prompt and output tokens: docs/source/performance/
# perf-overview.md of NVIDIA/TensorRT-LLM@00f37686 (v0.14 to v1.0) and developer-guide/perf-overview.md@03e27c7d.
_SENT = {
    (128, 128): 30000, (128, 2048): 3000, (128, 4096): 1500, (500, 2000): 3000, (1000, 1000): 3000, (1000, 2000): 1500,
    (2048, 128): 3000, (2048, 2048): 1500, (5000, 500): 1500, (20000, 2000): 1000, (1024, 1024): 3000,
    (8192, 1024): 1500, (1024, 8192): 1500, (32768, 1024): 1000, (1024, 32768): 1000,
}  # fmt: skip


@dataclass(frozen=True)
class MeasuredRow:
    """Hold a measurement and its predictions by the planner and by the speed-of-light baseline."""

    facts: Mapping[str, str]
    measured: float
    predicted: float
    speed_of_light: float

    @property
    def error(self) -> float:
        """Return the error of the prediction relative to the measurement."""
        return self.predicted / self.measured - 1


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file. Raises: ConfigError naming the file and the missing column."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in COLUMNS[1:12]:
        if rows and column not in rows[0]:
            raise ConfigError(f"{path} has no column {column!r}: it needs {', '.join(COLUMNS)}")
    return rows


def held_out(facts: Mapping[str, str]) -> bool:
    """Return whether a row's model or machine is held out: no constant was chosen on its rows."""
    return any(facts[column] in names for column, names in _HELD_OUT.items())


def predict(facts: Mapping[str, str], config_of: Callable[[str], ModelConfig]) -> MeasuredRow:
    """Predict a row. config_of: returns the config for a model's name.

    Raises: ConfigError or MeshError for a row without a valid placement.
    """
    config, devices = config_of(facts["model"]), int(facts["num_gpus"])
    precision = _precision(facts["precision"])
    config = _in_precision(config, precision)
    hardware = read_hardware(_hardware_name(facts["hardware"]))
    workload = _load(facts)
    mesh, layout = placed(
        facts["parallelism"], devices, moe=config.moe is not None, domain=hardware.scale_up_devices
    )  # fmt: skip
    kept = re.search(r"(bf16|fp8) KV|bf16 activations and KV", facts["precision"])
    kv_dtype = "fp8" if (kept and kept[1] == "fp8") or (kept is None and _BITS[precision] <= 8) else None
    evened = "EPLB" in facts["system"]  # experts are load-balanced
    request = SearchRequest(
        config=config, hardware=hardware, devices=devices, workload=workload, kv_dtype=kv_dtype,
        chunk_tokens=_CHUNK_TOKENS,
        axes=check_axes(mesh) if mesh else None, layout=parse_layout(layout) if layout else None,
        skew=0.0 if evened else SKEW,
    )  # fmt: skip
    try:
        plan = search(request).best
    except NoPlanError:  # requests that do not fit are queued
        plan = search(replace(request, workload=replace(workload, concurrency=None))).best
    return MeasuredRow(
        facts, float(facts["value"]), _metric(facts, plan, workload), _light(facts, config, hardware, devices, workload)
    )


def _load(facts: Mapping[str, str]) -> RequestWorkload:
    """Return the workload of a row, with the mean lengths if the lengths were random."""
    share = 1.0
    if drawn := re.search(r"(\d+)-(\d+)% of isl", facts["system"]):
        share = (int(drawn[1]) + int(drawn[2])) / 200
    concurrency = re.search(r"\d+", facts["batch_or_concurrency"])
    isl, osl = (max(1, round(share * int(facts[name]))) for name in ("isl", "osl"))
    return RequestWorkload(isl=isl, osl=osl, concurrency=int(concurrency[0]) if concurrency else None)


def _precision(text: str) -> str:
    text = text.lower()
    for name, words in (("fp4", ("fp4", "int4")), ("fp8", ("fp8",)), ("int8", ("int8", "w8"))):
        if any(word in text for word in words):
            return name
    return "bf16"


@lru_cache(maxsize=64)
def _in_precision(config: ModelConfig, precision: str) -> ModelConfig:
    """Return the config with matrices in the measured precision, regardless of its checkpoint."""
    kept = config.quantization.format.dtype if config.quantization else None
    if {"fp8": "float8_e4m3fn", "int8": "int8", "fp4": "mxfp4"}.get(precision) == kept:  # with its own blocks
        return config
    plain = with_weights_dtype(replace(config, checkpoint_quantization=None), "bfloat16")
    if precision == "bf16":
        return plain
    format = NVFP4 if precision == "fp4" else FORMATS[precision]
    return replace(plain, quantization=weight_quantization(plain, format, FAMILIES[config.family].names))


def _hardware_name(text: str) -> str:
    """Return the hardware preset of a table entry: the longest preset name that is a word of the text."""
    text = text.lower().replace("trillium", "v6e").replace("ironwood", "tpu7x").replace("tpu 7x", "tpu7x")
    words = [name for name in hardware_names() if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text)]
    return max(words, key=len, default=text)


def placed(
    parallelism: str, devices: int, *, moe: bool, domain: int = 8
) -> tuple[dict[str, int] | None, str | None]:  # fmt: skip
    """Parse a split (TP8, TP8 PP2, DEP8, EP16, TP8 EP4) into (axes, layout), or (None, None) if it has no degrees.

    domain: devices of one scale-up domain. Experts over several domains use a hierarchical dispatch. Devices beyond the
    split are data parallel replicas. Some systems shard experts by width over attention data parallel ranks; they are
    estimated as whole experts on these ranks.
    """
    said = re.sub(r"\(.*?\)", "", parallelism)
    degrees = {name: int(number) for name, number in re.findall(r"\b(TEP|DEP|TP|PP|EP|DP)\s*=?\s*(\d+)", said)}
    if not degrees:
        return None, None
    spread = "DEP" in degrees or re.search(r"attention_dp|attn DP|DP attention|attention DP", parallelism) is not None
    stages = degrees.get("PP", 1)
    split = degrees.get("TEP") or degrees.get("DEP") or degrees.get("TP", 1)
    experts = degrees.get("EP", 1)
    axes = {"pipeline": stages}
    layout = "ep-tp"
    if moe and (spread or (experts > 1 and "TP" not in degrees and "TEP" not in degrees)):
        ranks = max(split, experts)
        axes["expert"] = ranks
        if ranks > domain and ranks % domain == 0:
            axes["expert"], axes["tensor"], layout = ranks // domain, domain, "dp-ep"
    elif moe and ("TEP" in degrees or experts == split > 1):
        axes["tensor"], layout = split, "tp-ep"
    elif moe and 1 < experts < split and split % experts == 0:
        axes["expert"], axes["tensor"] = experts, split // experts
        layout = "batch=data,split=expert+tensor,experts=expert,expert_width=tensor"
    else:
        axes["tensor"] = split
    replicas = devices // math.prod(axes.values())
    return {"data": max(1, replicas), **axes}, layout


def _metric(facts: Mapping[str, str], plan: ServingPlan, workload: RequestWorkload) -> float:
    """Return the prediction of a row's metric, in its unit."""
    metric, estimate = facts["metric"].lower(), plan.estimate
    if "prefill" in facts["phase"].lower() and "throughput" in metric:
        serving = plan.serving
        step = serving.cost.step_time(StepBatch(0, serving.chunk_tokens, 0, workload.isl / 2)).total
        return serving.chunk_tokens * serving.ranks / step / (plan.devices if "per_" in metric else 1)
    if "decode" in facts["phase"].lower() and ("throughput" in metric or "disaggregated" in facts["system"].lower()):
        estimate = plan.serving.estimate(workload, estimate.concurrency, prefills=False)  # other devices prefill
    tokens = estimate.tokens_per_s
    if "trtllm-bench max load" in facts["system"] and (sent := _SENT.get((workload.isl, workload.osl))):
        tokens = _of_so_many(plan, workload, sent)
    return _in_unit(facts, workload, plan.devices, ttft=estimate.ttft, tpot=estimate.seconds_per_token, tokens=tokens)


def _of_so_many(plan: ServingPlan, workload: RequestWorkload, sent: int) -> float:
    """Return tokens per second for `sent` requests in total, at the plan's concurrency and then with the remainder."""
    each = plan.estimate.concurrency
    whole, rest = divmod(sent, each)
    seconds = whole * each * workload.osl / plan.estimate.tokens_per_s
    if rest:
        seconds += rest * workload.osl / plan.serving.estimate(workload, rest).tokens_per_s
    return sent * workload.osl / seconds


def _in_unit(
    facts: Mapping[str, str], workload: RequestWorkload, devices: int, *, ttft: float, tpot: float, tokens: float
) -> float:
    """Convert an estimate to a row's metric and unit.

    ttft, tpot: seconds. tokens: generated tokens per second over all devices.
    """
    metric, unit = facts["metric"].lower(), facts.get("unit", "").lower()
    seconds = 1.0 if unit == "s" else 1e3
    if any(word in metric for word in ("ttft", "first")):
        return ttft * seconds
    if any(word in metric for word in ("tpot", "itl", "inter", "time_per")):
        return tpot * seconds
    if "user" in metric or "user" in unit:
        return 1 / tpot
    if "request" in metric:
        tokens /= workload.osl
    elif "total_token" in metric or "input_output" in metric:
        tokens *= (workload.isl + workload.osl) / workload.osl
    elif "input" in metric:
        tokens *= workload.isl / workload.osl
    return tokens / devices if "per_gpu" in metric or "per_device" in metric or "gpu" in unit else tokens


def _light(
    facts: Mapping[str, str], config: ModelConfig, hardware: HardwareSpec, devices: int, workload: RequestWorkload
) -> float:  # fmt: skip
    """Predict a row by the speed-of-light baseline: peak rates, no collectives, no launches.

    Concurrency is limited only by the memory that weights leave free. Each token costs the FLOPs of the active
    parameters. Weights and KV cache are read once per step.
    """
    precision = _precision(facts["precision"])
    counts, width = _counts(config), _BITS[precision] / 8
    rate = hardware.tflops.get({"fp4": "fp8"}.get(precision, precision), hardware.tflops["bf16"]) * 1e12 * devices
    kv = kv_numbers(config) * (1 if width <= 1 else 2)
    room = max(hardware.hbm_bytes * devices - counts.total * width, 0.0)
    requests = workload.concurrency or max(1, int(room / (kv * (workload.isl + workload.osl))))
    matmuls = 2 * counts.active * requests * (1 + workload.isl / workload.osl) / rate
    read = (counts.total * width + requests * kv * (workload.isl + workload.osl / 2)) / (
        hardware.hbm_gbps * 1e9 * devices
    )
    step, first = max(matmuls, read), 2 * counts.active * workload.isl / rate
    return _in_unit(facts, workload, devices, ttft=first, tpot=step, tokens=requests / step)


@lru_cache(maxsize=64)
def _counts(config: ModelConfig) -> ParameterCounts:
    return count_parameters(config)


@dataclass(frozen=True)
class PredictionScore:
    """Describe how well predictions agree with measurements.

    mape: mean absolute relative error. rank: Spearman's rank correlation. regret: throughput lost by choosing the row
    predicted best, as a share of the best measured one, averaged over groups of rows that differ only in hardware and
    split; None without groups.
    """

    rows: int
    mape: float
    rank: float
    regret: float | None


def score(
    rows: Sequence[MeasuredRow], *, of: Callable[[MeasuredRow], float] = lambda row: row.predicted
) -> PredictionScore:
    """Score the predictions of rows, or another number of each row (of)."""
    errors = [abs(of(row) / row.measured - 1) for row in rows]
    places = _ranks([of(row) for row in rows]), _ranks([row.measured for row in rows])
    with np.errstate(invalid="ignore"):  # constant values have no correlation
        rank = float(np.corrcoef(*places)[0, 1]) if len(rows) > 1 else math.nan
    return PredictionScore(len(rows), float(np.mean(errors)), rank, _regret(rows, of))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return the ranks of values; ties get their mean rank."""
    ordered, where = np.unique(np.asarray(values), return_inverse=True)
    counts = np.bincount(where, minlength=len(ordered))
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


_LOAD = ("model", "precision", "isl", "osl", "system", "batch_or_concurrency", "metric")


def _regret(rows: Sequence[MeasuredRow], of: Callable[[MeasuredRow], float]) -> float | None:
    """Return the mean regret over workloads, by throughput per device; rows of other metrics are ignored."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        facts = row.facts
        if "throughput" not in facts["metric"]:
            continue
        each = 1 if "per_gpu" in facts["metric"] else int(facts["num_gpus"])
        key = tuple(facts[name] for name in _LOAD)
        groups.setdefault(key, []).append((of(row) / each, row.measured / each))
    lost = [1 - max(group)[1] / max(measured for _, measured in group) for group in groups.values() if len(group) > 1]
    return float(np.mean(lost)) if lost else None

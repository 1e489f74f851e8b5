"""Predictions held against published measurements: rows of a CSV, each a model on hardware under a load, and what a
system reached there. Nothing is fitted to a row."""

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
from jaxmoe.families.quantised import quantisation
from jaxmoe.formats import FORMATS, NVFP4
from jaxmoe.layouts import parse_layout
from jaxmoe.mesh import check_axes
from jaxmoe.planner.cost import Rows
from jaxmoe.planner.hardware import Hardware, hardware_names, read_hardware
from jaxmoe.planner.search import Plan, Question, search
from jaxmoe.planner.serving import Load
from jaxmoe.planner.sizes import Counts, count_parameters, kv_numbers

COLUMNS = (
    "system", "model", "hardware", "num_gpus", "parallelism", "precision", "phase", "isl", "osl",
    "batch_or_concurrency", "metric", "value", "unit", "source",
)  # fmt: skip
_CHUNK_TOKENS = 8192  # of a step, as serving systems set it where throughput is measured
_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4}


@dataclass(frozen=True)
class Row:
    """One measurement and what is predicted for it: by the planner, and by the speed of light alone."""

    facts: Mapping[str, str]
    measured: float
    predicted: float
    speed_of_light: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises: ConfigError naming the file and the column it lacks."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in COLUMNS[1:12]:
        if rows and column not in rows[0]:
            raise ConfigError(f"{path} has no column {column!r}: it needs {', '.join(COLUMNS)}")
    return rows


def predict(facts: Mapping[str, str], config_of: Callable[[str], ModelConfig]) -> Row:
    """What is predicted for a row. config_of: from the model's name. Raises: ConfigError, MeshError for a row that
    cannot be placed."""
    config, devices = config_of(facts["model"]), int(facts["num_gpus"])
    precision = _precision(facts["precision"])
    config = _in_precision(config, precision)
    hardware = read_hardware(_hardware_name(facts["hardware"]))
    asked = re.search(r"\d+", facts["batch_or_concurrency"])
    load = Load(isl=int(facts["isl"]), osl=int(facts["osl"]), concurrency=int(asked[0]) if asked else None)
    mesh, layout = placed(facts["parallelism"], devices, moe=config.moe is not None)
    kv_dtype = "fp8" if _BITS[precision] <= 8 else None
    plan = search(Question(
        config=config, hardware=hardware, devices=devices, load=load, kv_dtype=kv_dtype, chunk_tokens=_CHUNK_TOKENS,
        axes=check_axes(mesh) if mesh else None, layout=parse_layout(layout) if layout else None,
    )).best  # fmt: skip
    return Row(facts, float(facts["value"]), _metric(facts, plan, load), _light(facts, config, hardware, devices, load))


def _precision(text: str) -> str:
    text = text.lower()
    for name, words in (("fp4", ("fp4", "int4")), ("fp8", ("fp8",)), ("int8", ("int8", "w8"))):
        if any(word in text for word in words):
            return name
    return "bf16"


@lru_cache(maxsize=64)
def _in_precision(config: ModelConfig, precision: str) -> ModelConfig:
    """The config with matrices in the precision measured, whatever its checkpoint has."""
    kept = config.quantisation.format.dtype if config.quantisation else None
    if {"fp8": "float8_e4m3fn", "int8": "int8", "fp4": "mxfp4"}.get(precision) == kept:  # in its own blocks
        return config
    plain = with_weights_dtype(replace(config, published=None), "bfloat16")
    if precision == "bf16":
        return plain
    format = NVFP4 if precision == "fp4" else FORMATS[precision]
    return replace(plain, quantisation=quantisation(plain, format, FAMILIES[config.family].names))


def _hardware_name(text: str) -> str:
    """The preset a table means: the longest whose name stands in the text."""
    text = text.lower().replace("trillium", "v6e").replace("ironwood", "tpu7x").replace("tpu 7x", "tpu7x")
    return max((name for name in hardware_names() if name in text), key=len, default=text)


def placed(parallelism: str, devices: int, *, moe: bool) -> tuple[dict[str, int] | None, str | None]:
    """(axes, layout) of a split in the field's words, as TP8, TP8 PP2, DEP8, EP16; (None, None) where it says none.

    Devices beyond the split are replicas.
    """
    degrees = {name: int(number) for name, number in re.findall(r"\b(TEP|DEP|TP|PP|EP|DP)\s*=?\s*(\d+)", parallelism)}
    if not degrees:
        return None, None
    spread = "DEP" in degrees or re.search(r"attention_dp|attn DP|DP attention", parallelism) is not None
    stages = degrees.get("PP", 1)
    split = degrees.get("TEP") or degrees.get("DEP") or degrees.get("TP", 1)
    experts = degrees.get("EP", 1)
    axes = {"pipeline": stages}
    layout = "ep-tp"
    if moe and (spread or (experts > 1 and "TP" not in degrees and "TEP" not in degrees)):
        axes["expert"] = max(split, experts)
    elif moe and ("TEP" in degrees or experts == split > 1):
        axes["tensor"], layout = split, "tp-ep"
    else:
        axes["tensor"] = split
    replicas = devices // math.prod(axes.values())
    return {"data": max(1, replicas), **axes}, layout


def _metric(facts: Mapping[str, str], plan: Plan, load: Load) -> float:
    """The prediction of a row's metric, in its unit."""
    metric, served = facts["metric"].lower(), plan.served
    if "prefill" in facts["phase"].lower() and "throughput" in metric:
        serving = plan.serving
        step = serving.cost.seconds(Rows(0, serving.chunk_tokens, 0, load.isl / 2)).total
        return serving.chunk_tokens * serving.ranks / step / (plan.devices if "per_" in metric else 1)
    return _in_unit(facts, load, plan.devices, ttft=served.ttft, tpot=served.tpot, tokens=plan.tokens_a_second)


def _in_unit(facts: Mapping[str, str], load: Load, devices: int, *, ttft: float, tpot: float, tokens: float) -> float:
    """A row's metric, in its unit, of seconds to the first token, seconds a token, generated tokens a second of all."""
    metric, unit = facts["metric"].lower(), facts.get("unit", "").lower()
    seconds = 1.0 if unit == "s" else 1e3
    if any(word in metric for word in ("ttft", "first")):
        return ttft * seconds
    if any(word in metric for word in ("tpot", "itl", "inter", "time_per")):
        return tpot * seconds
    if "user" in metric or "user" in unit:
        return 1 / tpot
    if "request" in metric:
        tokens /= load.osl
    elif "total_token" in metric or "input_output" in metric:
        tokens *= (load.isl + load.osl) / load.osl
    return tokens / devices if "per_gpu" in metric or "per_device" in metric or "gpu" in unit else tokens


def _light(
    facts: Mapping[str, str], config: ModelConfig, hardware: Hardware, devices: int, load: Load
) -> float:  # fmt: skip
    """The baseline: rates on paper, no collectives, no launches; as many requests as memory left by weights has room
    for, each token's products by its active parameters, weights and pages read once a turn."""
    precision = _precision(facts["precision"])
    counts, width = _counts(config), _BITS[precision] / 8
    rate = hardware.tflops.get({"fp4": "fp8"}.get(precision, precision), hardware.tflops["bf16"]) * 1e12 * devices
    kv = kv_numbers(config) * (1 if width <= 1 else 2)
    room = max(hardware.hbm_bytes * devices - counts.total * width, 0.0)
    requests = load.concurrency or max(1, int(room / (kv * (load.isl + load.osl))))
    products = 2 * counts.active * requests * (1 + load.isl / load.osl) / rate
    read = (counts.total * width + requests * kv * (load.isl + load.osl / 2)) / (hardware.hbm_gbps * 1e9 * devices)
    turn, first = max(products, read), 2 * counts.active * load.isl / rate
    return _in_unit(facts, load, devices, ttft=first, tpot=turn, tokens=requests / turn)


@lru_cache(maxsize=64)
def _counts(config: ModelConfig) -> Counts:
    return count_parameters(config)


@dataclass(frozen=True)
class Score:
    """How predictions agree with measurements. mape: mean absolute relative error. rank: Spearman's correlation.
    regret: over groups of rows that differ in hardware and split alone, the share of the best measured that is lost by
    taking the one predicted best; None without such groups."""

    rows: int
    mape: float
    rank: float
    regret: float | None


def score(rows: Sequence[Row], *, of: Callable[[Row], float] = lambda row: row.predicted) -> Score:
    """Of predictions, or of another number of each row."""
    errors = [abs(of(row) / row.measured - 1) for row in rows]
    ranks = np.corrcoef(_ranks([of(row) for row in rows]), _ranks([row.measured for row in rows]))[0, 1]
    return Score(len(rows), float(np.mean(errors)), float(ranks), _regret(rows, of))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Places in order, equal values sharing theirs."""
    ordered, where = np.unique(np.asarray(values), return_inverse=True)
    counts = np.bincount(where, minlength=len(ordered))
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def _regret(rows: Sequence[Row], of: Callable[[Row], float]) -> float | None:
    """Of each load of a model: more tokens a second of a device are better; rows of times are left out."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        facts = row.facts
        if "throughput" not in facts["metric"]:
            continue
        each = 1 if "per_gpu" in facts["metric"] else int(facts["num_gpus"])
        key = tuple(facts[name] for name in ("model", "precision", "isl", "osl", "system"))
        groups.setdefault(key, []).append((of(row) / each, row.measured / each))
    lost = [1 - max(group)[1] / max(measured for _, measured in group) for group in groups.values() if len(group) > 1]
    return float(np.mean(lost)) if lost else None

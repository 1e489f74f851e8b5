"""Questions of models by name on hardware by name, and what was found: searched once for all tests."""

from __future__ import annotations

from functools import cache

from jaxmoe.families import read_config
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.planner.search import SearchResult, search
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.specs import SearchRequest
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config

LOAD = RequestWorkload(isl=1024, osl=1024)


@cache
def question(model: str, hardware: str, devices: int, objective: str = "throughput") -> SearchRequest:
    """DeepSeek's models with keys and values in fp8."""
    config = read_config(read_json(find_config(model)), planned=True)
    return SearchRequest(
        config=config, hardware=read_hardware(hardware), devices=devices, workload=LOAD, objective=objective,
        kv_dtype="fp8" if model.startswith("deepseek") else None,
    )  # fmt: skip


@cache
def found(model: str, hardware: str, devices: int, objective: str = "throughput") -> SearchResult:
    """What the search found."""
    return search(question(model, hardware, devices, objective))

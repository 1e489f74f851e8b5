"""jaxmoe: runs one Mixture-of-Experts model over many devices as if they were one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxmoe.config import CacheConfig, EngineConfig, ParallelConfig
from jaxmoe.errors import (
    CheckpointError,
    ConfigError,
    JaxmoeError,
    LayoutError,
    MeshError,
    ProcessLostError,
    RequestError,
    StepError,
)

if TYPE_CHECKING:
    from jaxmoe.api.async_engine import AsyncEngine, RequestStream
    from jaxmoe.api.llm import LLM
    from jaxmoe.api.outputs import CompletionOutput, RequestOutput, TokenEvent
    from jaxmoe.engine.experts import ExpertLoads
    from jaxmoe.engine.request import SamplingParams
    from jaxmoe.model.kernels import KernelConfig
    from jaxmoe.parallel.eplb import ExpertPlacement
    from jaxmoe.parallel.layouts import ShardingLayout
    from jaxmoe.parallel.processes import ProcessGroup, join

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "CacheConfig",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "ExpertLoads",
    "ExpertPlacement",
    "JaxmoeError",
    "KernelConfig",
    "LayoutError",
    "MeshError",
    "ParallelConfig",
    "ProcessGroup",
    "ProcessLostError",
    "RequestError",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "ShardingLayout",
    "StepError",
    "TokenEvent",
    "join",
]  # fmt: skip

# Imported on first use: JAX must not start before the number of devices is known.
_LAZY = {
    "LLM": "jaxmoe.api.llm",
    "AsyncEngine": "jaxmoe.api.async_engine",
    "RequestStream": "jaxmoe.api.async_engine",
    "ExpertLoads": "jaxmoe.engine.experts",
    "CompletionOutput": "jaxmoe.api.outputs",
    "TokenEvent": "jaxmoe.api.outputs",
    "RequestOutput": "jaxmoe.api.outputs",
    "SamplingParams": "jaxmoe.engine.request",
    "KernelConfig": "jaxmoe.model.kernels",
    "ExpertPlacement": "jaxmoe.parallel.eplb",
    "ShardingLayout": "jaxmoe.parallel.layouts",
    "ProcessGroup": "jaxmoe.parallel.processes",
    "join": "jaxmoe.parallel.processes",
}
_RENAMED = {"Engine": "AsyncEngine", "Chunk": "TokenEvent", "Layout": "ShardingLayout"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"jaxmoe.{name} is now called jaxmoe.{_RENAMED[name]}")
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

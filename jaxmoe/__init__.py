"""jaxmoe: runs one Mixture-of-Experts model over many devices as if they were one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxmoe.errors import CheckpointError, ConfigError, JaxmoeError, MeshError, RequestError, StepError

if TYPE_CHECKING:
    from jaxmoe.api.async_engine import AsyncEngine
    from jaxmoe.api.llm import LLM
    from jaxmoe.engine.request import RequestOutput, SamplingParams, TokenEvent

__version__ = "0.1.0"
__all__ = [
    "LLM", "AsyncEngine", "CheckpointError", "ConfigError", "JaxmoeError", "MeshError", "RequestError",
    "RequestOutput", "SamplingParams", "StepError", "TokenEvent",
]  # fmt: skip

# Imported on first use: JAX must not start before the number of devices is known.
_LAZY = {
    "LLM": "jaxmoe.api.llm",
    "AsyncEngine": "jaxmoe.api.async_engine",
    "TokenEvent": "jaxmoe.engine.request",
    "RequestOutput": "jaxmoe.engine.request",
    "SamplingParams": "jaxmoe.engine.request",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

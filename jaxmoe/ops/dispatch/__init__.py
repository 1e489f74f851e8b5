"""Exchange of tokens between expert-parallel ranks."""

from jaxmoe.ops.dispatch.api import MAX_RAGGED_GPUS, combine, dispatch, unsupported_reason
from jaxmoe.ops.dispatch.backends import BACKENDS, HIERARCHICAL
from jaxmoe.ops.dispatch.spec import DispatchBackend, DispatchSpec

__all__ = [
    "BACKENDS",
    "HIERARCHICAL",
    "MAX_RAGGED_GPUS",
    "DispatchBackend",
    "DispatchSpec",
    "combine",
    "dispatch",
    "unsupported_reason",
]

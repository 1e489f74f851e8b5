"""SwiGLU of many experts, each on the tokens that are routed to it."""

from jaxmoe.ops.grouped_matmul.api import grouped_swiglu
from jaxmoe.ops.grouped_matmul.backends import BACKENDS, GroupedBackend

__all__ = ["BACKENDS", "GroupedBackend", "grouped_swiglu"]

"""Matmuls of tokens with one matrix."""

from jaxmoe.ops.linear.api import linear
from jaxmoe.ops.linear.backends import BACKENDS, LinearBackend

__all__ = ["BACKENDS", "LinearBackend", "linear"]

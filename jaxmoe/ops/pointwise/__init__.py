"""Row-wise operations between matmuls: norms, rotary embedding, routing, gated activations."""

from jaxmoe.ops.pointwise.backends import BACKENDS, PointwiseBackend
from jaxmoe.ops.pointwise.gate import gated_rows, gated_unit
from jaxmoe.ops.pointwise.norm import rms_norm, scale_by_rms, sum_of_squares
from jaxmoe.ops.pointwise.rope import inverse_frequencies, rotate, rotation
from jaxmoe.ops.pointwise.route import RouteRule, replica_hash, route, to_physical

__all__ = [
    "BACKENDS",
    "PointwiseBackend",
    "RouteRule",
    "gated_rows",
    "gated_unit",
    "inverse_frequencies",
    "replica_hash",
    "rms_norm",
    "rotate",
    "rotation",
    "route",
    "scale_by_rms",
    "sum_of_squares",
    "to_physical",
]

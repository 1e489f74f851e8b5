"""Exchange of tokens along the outermost axis first, then along the other axes (DispatchSpec.levels)."""

from __future__ import annotations

from jaxmoe.ops.dispatch import all_to_all, ragged_all_to_all
from jaxmoe.ops.dispatch.spec import DispatchOutput, DispatchSpec

_INNER = {"all_to_all": all_to_all, "ragged_all_to_all": ragged_all_to_all}


def dispatch(x, weights, exchange: DispatchSpec) -> DispatchOutput:
    """Compute ops.dispatch.dispatch."""
    outer, inner = exchange.levels()
    near = all_to_all.dispatch(x, weights, outer)
    return near if inner.num_ranks == 1 else _INNER[inner.backend].dispatch(near.x, near.weights, inner)


def combine(y, sent, exchange: DispatchSpec):
    """Compute ops.dispatch.combine."""
    outer, inner = exchange.levels()
    near = y if inner.num_ranks == 1 else _INNER[inner.backend].combine(y, sent, inner)
    return all_to_all.combine(near, None, outer)

"""Expert-parallel dispatch and combine of tokens. Dropless; call these functions inside shard_map.

dispatch sends tokens to the ranks that hold their experts, with the combine weights of the receiving rank's experts.
combine returns, for this rank's own tokens, the sum of the expert outputs over all ranks.
"""

# Dims: N ranks of the expert axes, t tokens of this rank, D width, E experts.
from __future__ import annotations

from jaxtyping import Array, Float

from jaxmoe.ops.dispatch.backends import BACKENDS, HIERARCHICAL
from jaxmoe.ops.dispatch.spec import DispatchOutput, DispatchSpec, DispatchState
from jaxmoe.parallel.sharding import MeshPlacement

MAX_RAGGED_GPUS = 8  # the most ranks that XLA's GPU kernel supports; see docs/decisions/0008


def unsupported_reason(backend: str, placement: MeshPlacement) -> str | None:
    """Return why a backend is unsupported on this platform or mesh, or None if it is supported."""
    peers, levels = placement.ragged_peers(backend), placement.dispatch_levels
    if placement.platform == "gpu" and peers > MAX_RAGGED_GPUS:
        other = "all_to_all" if backend == "ragged_all_to_all" else "hierarchical"
        return f"reaches {MAX_RAGGED_GPUS} GPUs at most, experts are exchanged among {peers}: use {other}"
    if backend in HIERARCHICAL and len(levels) == 1:
        return (
            f"needs two or more expert axes, but experts are exchanged along {levels[0]} alone: shard experts over two "
            "axes, as expert=2,tensor=8 in layout dp-ep does, or use all_to_all"
        )
    return None


def dispatch(x: Float[Array, "t D"], weights: Float[Array, "t E"], exchange: DispatchSpec) -> DispatchOutput:
    """Send tokens to the ranks that hold their experts.

    The weights are concatenated to x and sent with it. Ragged backends also exchange row counts.
    """
    weights = weights.astype(x.dtype)
    if exchange.num_ranks == 1:
        return DispatchOutput(x, weights, None)
    return BACKENDS[exchange.backend].kernels["dispatch"](x, weights, exchange)


def combine(y: Float[Array, "N*t D"], sent: DispatchState | None, exchange: DispatchSpec) -> Float[Array, "t D"]:
    """Return the sum over ranks of the expert outputs for this rank's tokens. Runs one collective per level."""
    if exchange.num_ranks == 1:
        return y
    return BACKENDS[exchange.backend].kernels["combine"](y, sent, exchange)

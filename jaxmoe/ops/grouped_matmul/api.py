"""Grouped SwiGLU: apply each expert to the tokens that are routed to it.

The cost depends on the number of routed rows, not on the number of experts. Experts may have gate and up biases and a
clamped SwiGLU. The caller adds the down bias, which needs no matmul.
"""

# Dims: L layers, T tokens, D width, E experts, F expert width.
from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.config import SwiGLUClamp
from jaxmoe.ops.grouped_matmul.backends import BACKENDS, GroupedBackend
from jaxmoe.ops.grouped_matmul.experts import GroupedSwiGLUConfig
from jaxmoe.ops.quantized_matmul import QuantizedArray
from jaxmoe.ops.stack import LayerIndex


def grouped_swiglu(
    x: Float[Array, "T D"],
    weights: Float[Array, "T E"],
    gate_up: Float[Array, "L E 2 D F"] | QuantizedArray,
    down: Float[Array, "L E F D"] | QuantizedArray,
    layer: LayerIndex = 0,
    bias: Float[Array, "L E 2 F"] | None = None,
    *,
    top_k: int,
    clamp: SwiGLUClamp | None = None,
    backend: GroupedBackend = "blocks",
) -> Float[Array, "T D"]:
    """Return for each token the sum over its experts of weight * down(silu(gate(x)) * up(x)).

    Matmuls accumulate in float32. weights: combine weights, zero for experts that a token is not routed to; no token
    may have more than top_k experts. gate_up, down: experts of L layers, of which `layer` is used. bias: gate and up
    biases. clamp: replaces silu(gate) * up by the clamped SwiGLU, see SwiGLUClamp.
    """
    rule = GroupedSwiGLUConfig(top_k, clamp)
    kernel = BACKENDS[backend].kernels["grouped_swiglu"]
    return kernel(rule, jnp.asarray(x), weights, gate_up, down, bias, layer)

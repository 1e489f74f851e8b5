"""Grouped SwiGLU by a C++ kernel for CPUs (ops/native/experts.cc). Gradients are those of blocks."""

# Dims: L layers, T tokens, D width, E experts, F expert width.
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmoe.ops import native
from jaxmoe.ops.grouped_matmul import blocks
from jaxmoe.ops.grouped_matmul.experts import GroupedSwiGLUConfig
from jaxmoe.ops.stack import LayerIndex


def grouped_swiglu(rule, *arrays):
    """Compute ops.grouped_matmul, by blocks if there are too many tokens for the kernel."""
    dtype = arrays[0].dtype.name
    native.prepare(dtype)
    if arrays[0].shape[0] > native.max_tokens(dtype):
        return blocks.grouped_swiglu(rule, *arrays)
    return _grouped_swiglu(rule, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(
    rule: GroupedSwiGLUConfig,
    x: Float[Array, "T D"],
    weights: Float[Array, "T E"],
    gate_up: Float[Array, "L E 2 D F"],
    down: Float[Array, "L E F D"],
    bias: Float[Array, "L E 2 F"] | None,
    layer: LayerIndex,
) -> Float[Array, "T D"]:
    """Call the kernel. x, gate_up and down are bfloat16 or float32."""
    call = jax.ffi.ffi_call("jaxmoe_experts", jax.ShapeDtypeStruct(x.shape, x.dtype))
    own, clamp = jnp.zeros((0, 0), x.dtype) if bias is None else bias, rule.clamp
    limits = dict(limit=np.float32(clamp.limit if clamp else 0), alpha=np.float32(clamp.alpha if clamp else 1))
    return call(x, weights.astype(jnp.float32), gate_up, down, own, jnp.int32(layer), **limits)


_grouped_swiglu.defvjp(lambda rule, *saved: (_grouped_swiglu(rule, *saved), saved), blocks.backward)

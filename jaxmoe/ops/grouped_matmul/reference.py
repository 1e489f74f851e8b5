"""Reference of the grouped experts: one expert after the other on all tokens, in float32."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoe.config import SwiGLUClamp
from jaxmoe.ops.quantized_matmul import layer_weights


def grouped_swiglu(x, weights, gate_up, down, layer=0, bias=None, *, top_k: int, clamp: SwiGLUClamp | None = None):
    """Define the result of ops.grouped_matmul."""
    del top_k
    x32, y = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32)
    gate_up, down = (layer_weights(w, layer, jnp.dtype(jnp.float32)).astype(jnp.float32) for w in (gate_up, down))
    for expert in range(weights.shape[1]):
        gate, up = (jnp.dot(x32, w, precision="highest") for w in gate_up[expert])
        if bias is not None:
            gate, up = (
                part + own.astype(jnp.float32) for part, own in zip((gate, up), bias[layer, expert], strict=True)
            )
        if clamp is not None:
            gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit) + 1
        hidden = gate / (1 + jnp.exp(-(clamp.alpha if clamp else 1) * gate)) * up
        y += weights[:, expert, None].astype(jnp.float32) * jnp.dot(hidden, down[expert], precision="highest")
    return y.astype(x.dtype)

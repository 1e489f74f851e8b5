"""Grouped SwiGLU by matmuls of every token with every expert."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoe.ops.grouped_matmul.experts import biased_unit
from jaxmoe.ops.quantized_matmul import layer_weights
from jaxmoe.ops.stack import layer_of


def grouped_swiglu(rule, x, weights, gate_up, down, bias, layer):
    gate_up, down = (layer_weights(w, layer, x.dtype) for w in (gate_up, down))
    both = jnp.einsum("td,ecdf->tecf", x, gate_up, preferred_element_type=jnp.float32)
    hidden = biased_unit(both[:, :, 0], both[:, :, 1], None if bias is None else layer_of(bias, layer), rule.clamp)
    hidden = hidden.astype(x.dtype).astype(jnp.float32)
    y = jnp.einsum("tef,efd->ted", hidden, down.astype(jnp.float32))
    return jnp.sum(y * weights[:, :, None].astype(jnp.float32), axis=1).astype(x.dtype)

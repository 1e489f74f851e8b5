"""Grouped SwiGLU by `jax.lax.ragged_dot`, a kernel on TPU. Copies a layer's experts out of the stack of layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.ops.grouped_matmul.assignments import sort_assignments
from jaxmoe.ops.grouped_matmul.experts import biased_unit
from jaxmoe.ops.quantized_matmul import layer_weights
from jaxmoe.ops.stack import layer_of


def grouped_swiglu(rule, x, weights, gate_up, down, bias, layer):
    gate_up, down = (layer_weights(w, layer, x.dtype) for w in (gate_up, down))
    plan = sort_assignments(weights, top_k=rule.top_k)
    counts = jnp.diff(plan.ends, prepend=0)
    in_turn = gate_up.reshape(-1, *gate_up.shape[2:])  # gate and up of expert 0, gate and up of expert 1, ...
    counts_of = (jnp.stack(pair, axis=1).reshape(-1) for pair in ((counts, 0 * counts), (0 * counts, counts)))
    rows = x.at[plan.tokens].get(mode="fill", fill_value=0)
    gate, up = (jax.lax.ragged_dot(rows, in_turn, own).astype(jnp.float32) for own in counts_of)
    row = jnp.arange(len(plan.tokens))[:, None]
    own = None if bias is None else layer_of(bias, layer)[jnp.minimum(jnp.sum(plan.ends <= row, axis=1), len(down) - 1)]
    hidden = biased_unit(gate, up, own, rule.clamp)
    y = jax.lax.ragged_dot(hidden.astype(x.dtype), down, counts).astype(jnp.float32)
    y = y * plan.weights[:, None].astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[plan.tokens].add(y, mode="drop").astype(x.dtype)

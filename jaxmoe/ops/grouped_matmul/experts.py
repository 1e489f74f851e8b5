"""Computation of one expert: its matrices within the stack of all experts, its matmuls and its activation."""

# Dims: D width, F expert width, R rows of a block.
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.config import SwiGLUClamp
from jaxmoe.ops.quantized_matmul import QuantizedArray, multiply
from jaxmoe.ops.stack import LayerIndex


class GroupedSwiGLUConfig(NamedTuple):
    """Hold the static options: the maximum number of experts per token, and the SwiGLU clamp."""

    top_k: int
    clamp: SwiGLUClamp | None


class _ExpertMatrix(NamedTuple):
    """Reference one matrix in a stack of quantized ones without copying it."""

    stacked: QuantizedArray
    indices: tuple[LayerIndex, ...]


def _matrix(stacked, *index):
    """Slice the matrix [M, N] at `index` of stacked [..., M, N] without copying the stack."""
    if isinstance(stacked, QuantizedArray):
        return _ExpertMatrix(stacked, index)
    matrix = stacked.shape[-2:]
    return jax.lax.dynamic_slice(stacked, (*index, 0, 0), (*(1,) * len(index), *matrix)).reshape(matrix)


def _times(x, matrix):
    """Multiply rows x [R, M] by a matrix [M, N]; return float32."""
    if isinstance(matrix, _ExpertMatrix):
        return multiply(x, matrix.stacked, matrix.indices)
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


class ExpertWeights(NamedTuple):
    """Hold the weights of one expert of one layer, with the gate and up biases if the model has them."""

    gate: Float[Array, "D F"] | _ExpertMatrix
    up: Float[Array, "D F"] | _ExpertMatrix
    down: Float[Array, "F D"] | _ExpertMatrix
    bias: Float[Array, "2 F"] | None = None


def expert_weights(gate_up, down, bias, layer, index):
    own = None if bias is None else _matrix(bias, layer, index)
    return ExpertWeights(
        _matrix(gate_up, layer, index, 0), _matrix(gate_up, layer, index, 1), _matrix(down, layer, index), own
    )


def biased_unit(gate, up, bias, clamp: SwiGLUClamp | None):
    """Add bias [..., 2, F] to gate and up activations [..., F], then apply the expert's (clamped) SwiGLU."""
    if bias is not None:
        gate, up = gate + bias[..., 0, :].astype(gate.dtype), up + bias[..., 1, :].astype(up.dtype)
    if clamp is None:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit)
    return gate * jax.nn.sigmoid(clamp.alpha * gate) * (up + 1)


def hidden_activations(x, w: ExpertWeights):
    """Return gate and up activations of rows x [R, D], without bias, as float32 [R, F]."""
    return _times(x, w.gate), _times(x, w.up)


def expert_swiglu(x, w: ExpertWeights, clamp: SwiGLUClamp | None):
    def matmuls(x, w):
        gate, up = hidden_activations(x, w)
        hidden = biased_unit(gate, up, w.bias, clamp).astype(x.dtype)
        return _times(hidden, w.down)

    if x.shape[0] == 1 and x.dtype.itemsize < 4 and not isinstance(w.gate, _ExpertMatrix):
        # CPU only: for sums of rows, XLA:TPU would change the layout of all experts' weights.
        one = partial(_swiglu_row, clamp=clamp)
        return jax.lax.platform_dependent(x, w, cpu=one, default=matmuls)
    return matmuls(x, w)


def _swiglu_row(x, w: ExpertWeights, *, clamp: SwiGLUClamp | None):
    return swiglu_one(x[0], w, clamp)[None]


def swiglu_one(x: Float[Array, "D"], w: ExpertWeights, clamp: SwiGLUClamp | None = None) -> Float[Array, "D"]:
    """Apply an expert to one 16-bit row, as a weighted sum of the rows of its matrices.

    XLA:CPU's matmul of a single 16-bit row converts the weights to float32 first, which takes three times as long.
    """

    def times(x, w):
        scale = x.astype(jnp.float32).reshape(-1, *(1,) * (w.ndim - 1))
        return jnp.sum(scale * w.astype(jnp.float32), axis=0)

    return times(biased_unit(times(x, w.gate), times(x, w.up), w.bias, clamp).astype(x.dtype), w.down)

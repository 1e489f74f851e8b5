"""Grouped SwiGLU: apply each expert to the tokens that are routed to it.

The cost depends on the number of routed rows, not on the number of experts. Experts may have gate and up biases and a
clamped SwiGLU. The caller adds the down bias, which needs no matmul.

- blocks: sorts tokens by expert and cuts them in blocks of rows of one expert. Loops visit the full blocks first, then
  each expert's remaining rows in the smallest block that holds them; their trip counts follow the routing. Weights are
  read in place, and experts without tokens are never read. Any platform.
- ragged: `jax.lax.ragged_dot`, a kernel on TPU. Copies a layer's experts out of the stack of layers. On CPU and with
  the stock GPU lowering it costs num_experts times as much.
- native: a C++ kernel for CPUs (ops/native; needs a compiler). It reads weights at memory bandwidth for few tokens, and
  a token's result does not depend on other tokens. Falls back to blocks for gradients, and for many tokens if the
  processor multiplies bfloat16 in hardware.
- dense: applies every expert to every token; the oracle.

For quantized weights, blocks dequantizes a few columns of one expert at a time (ops/quantized_matmul.py); ragged and
dense dequantize a whole layer at once.
"""

# Dims: L layers, T tokens, D width, E experts, F expert width, A = T * min(K, E) maximum number of assignments,
# R rows of a block.
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import SwiGLUClamp
from jaxmoe.ops import native
from jaxmoe.ops.quantized_matmul import QuantizedArray, layer_weights, multiply
from jaxmoe.ops.stack import LayerIndex, layer_of

GroupedBackend = Literal["blocks", "ragged", "native", "dense"]
GROUPED_BACKENDS: tuple[GroupedBackend, ...] = ("blocks", "ragged", "native", "dense")


class ExpertAssignments(NamedTuple):
    """List routed (token, expert) pairs sorted by expert. Rows from ends[-1] on have token index T and weight 0.

    ends: for each expert, the index after its last row.
    """

    tokens: Int[Array, "A"]
    weights: Float[Array, "A"]
    ends: Int[Array, "E"]


def sort_assignments(weights: Float[Array, "T E"], *, top_k: int) -> ExpertAssignments:
    """Return one row per nonzero weight, sorted by expert and then by token. No token may have more than top_k."""
    num_tokens, num_experts = weights.shape
    routed = weights != 0
    ends = jnp.cumsum(jnp.sum(routed, axis=0, dtype=jnp.int32))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    bound = num_tokens * min(top_k, num_experts)
    row = starts + jnp.cumsum(routed, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(routed, row, bound)
    token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row.shape)
    tokens = jnp.full((bound,), num_tokens, jnp.int32).at[row].set(token, mode="drop")
    sorted_weights = jnp.zeros((bound,), weights.dtype).at[row].set(weights, mode="drop")
    return ExpertAssignments(tokens, sorted_weights, ends)


_DROPPED = 1 << 30  # token indices from here on are out of range of any array
# Block sizes in rows, by the maximum number of tokens. A block of few rows costs one read of the weights regardless of
# its size, so decode needs exact sizes. Many rows are compute-bound, so prefill needs large blocks. See
# docs/benchmarks.md.
_SIZES = {
    64: (1, 2, 3, 4, 6, 8),
    512: (1, 2, 4, 8, 16, 32),
    2048: (4, 8, 16, 32, 64, 128),
    1 << 62: (4, 8, 16, 32, 64, 128, 256),
}


def block_sizes(num_tokens: int) -> tuple[int, ...]:
    """Return the block sizes in rows, smallest first. They are few, because every size is compiled."""
    sizes = next(sizes for tokens, sizes in _SIZES.items() if num_tokens <= tokens)
    return tuple(rows for rows in sizes if rows <= num_tokens)


class BlockPlan(NamedTuple):
    """Partition each expert's rows into full blocks of the largest size and one block for the remaining rows.

    full_ends: cumulative number of full blocks of the experts. by_size: experts sorted by the size of their remainder
    block; experts without a remainder come first. rest_starts, rest_ends: for each size, the range in by_size of the
    experts with a remainder block of that size.
    """

    full_ends: Int[Array, "E"]
    by_size: Int[Array, "E"]
    rest_starts: Int[Array, " sizes"]
    rest_ends: Int[Array, " sizes"]


def plan_blocks(ends: Int[Array, "E"], sizes: tuple[int, ...]) -> BlockPlan:
    """Plan the blocks of experts with rows that end at `ends`. Remainders are rounded up to the next block size."""
    counts = jnp.diff(ends, prepend=0)
    full, rest = counts // sizes[-1], counts % sizes[-1]
    size_index = jnp.sum(rest[:, None] > jnp.array(sizes), axis=1)
    size_index = jnp.where(rest == 0, -1, size_index)
    rest_ends = jnp.sum(size_index[:, None] <= jnp.arange(len(sizes)), axis=0, dtype=jnp.int32)
    empty = jnp.sum(size_index < 0, dtype=jnp.int32)
    rest_starts = jnp.concatenate([empty[None], rest_ends[:-1]])
    return BlockPlan(jnp.cumsum(full, dtype=jnp.int32), jnp.argsort(size_index, stable=True), rest_starts, rest_ends)


def _for_each_block(plan: ExpertAssignments, sizes: tuple[int, ...], visit, carry):
    """Fold carry = visit(carry, expert, tokens, weights) over all blocks, where tokens and weights are rows [R].

    Padded rows have weight 0 and distinct token indices that are out of range.
    """
    blocks, largest = plan_blocks(plan.ends, sizes), sizes[-1]
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), plan.ends[:-1]])
    tokens = jnp.pad(plan.tokens, (0, largest))
    weights = jnp.pad(plan.weights, (0, largest))

    def rows_of(expert, first, rows):
        row_index = first + jnp.arange(rows, dtype=jnp.int32)
        real = row_index < plan.ends[expert]
        block_tokens = jnp.where(real, _take(tokens, first, rows), _DROPPED + jnp.arange(rows, dtype=jnp.int32))
        return block_tokens, jnp.where(real, _take(weights, first, rows), 0)

    def full_block(i, carry):
        expert = jnp.sum(blocks.full_ends <= i, dtype=jnp.int32)
        before = jnp.where(expert > 0, blocks.full_ends[expert - 1], 0)
        return visit(carry, expert, *rows_of(expert, starts[expert] + (i - before) * largest, largest))

    carry = jax.lax.fori_loop(0, blocks.full_ends[-1], full_block, carry)
    for index, rows in enumerate(sizes):

        def rest_block(i, carry, rows=rows):
            expert = blocks.by_size[i]
            count = plan.ends[expert] - starts[expert]
            return visit(carry, expert, *rows_of(expert, plan.ends[expert] - count % largest, rows))

        carry = jax.lax.fori_loop(blocks.rest_starts[index], blocks.rest_ends[index], rest_block, carry)
    return carry


def _take(values, start, rows):
    return jax.lax.dynamic_slice_in_dim(values, start, rows, axis=0)


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


def _expert(gate_up, down, bias, layer, index):
    own = None if bias is None else _matrix(bias, layer, index)
    return ExpertWeights(
        _matrix(gate_up, layer, index, 0), _matrix(gate_up, layer, index, 1), _matrix(down, layer, index), own
    )


def _unit(gate, up, bias, clamp: SwiGLUClamp | None):
    """Add bias [..., 2, F] to gate and up activations [..., F], then apply the expert's (clamped) SwiGLU."""
    if bias is not None:
        gate, up = gate + bias[..., 0, :].astype(gate.dtype), up + bias[..., 1, :].astype(up.dtype)
    if clamp is None:
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit)
    return gate * jax.nn.sigmoid(clamp.alpha * gate) * (up + 1)


def _hidden(x, w: ExpertWeights):
    """Return gate and up activations of rows x [R, D], without bias, as float32 [R, F]."""
    return _times(x, w.gate), _times(x, w.up)


def _swiglu(x, w: ExpertWeights, clamp: SwiGLUClamp | None):
    def matmuls(x, w):
        gate, up = _hidden(x, w)
        hidden = _unit(gate, up, w.bias, clamp).astype(x.dtype)
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

    return times(_unit(times(x, w.gate), times(x, w.up), w.bias, clamp).astype(x.dtype), w.down)


class GroupedSwiGLUConfig(NamedTuple):
    """Hold the static options: the maximum number of experts per token, and the SwiGLU clamp."""

    top_k: int
    clamp: SwiGLUClamp | None


def _blocks_forward(rule, x, weights, gate_up, down, bias, layer):
    plan = sort_assignments(weights, top_k=rule.top_k)

    def visit(out, expert, tokens, weights):
        rows = x.at[tokens].get(mode="clip")
        y = _swiglu(rows, _expert(gate_up, down, bias, layer, expert), rule.clamp)
        return out.at[tokens].add(y * weights[:, None].astype(jnp.float32), mode="drop", unique_indices=True)

    out = _for_each_block(plan, block_sizes(x.shape[0]), visit, jnp.zeros(x.shape, jnp.float32))
    return out.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(rule, *arrays):
    return _blocks_forward(rule, *arrays)


def _blocks_fwd(rule, *saved):
    return _blocks_forward(rule, *saved), saved


def _blocks_bwd(rule, saved, dy):
    """Compute gradients block by block in float32 sums, and recompute the activations."""
    x, weights, gate_up, down, bias, layer = saved
    plan = sort_assignments(weights, top_k=rule.top_k)
    dy = dy.astype(x.dtype)

    def visit(carry, expert, tokens, weights):
        dx, dweights, dgate_up, ddown, dbias = carry
        scale = weights[:, None].astype(jnp.float32)
        x_rows, dy_rows = x.at[tokens].get(mode="clip"), dy.at[tokens].get(mode="fill", fill_value=0)
        w = _expert(gate_up, down, bias, layer, expert)
        hidden, unit_back = jax.vjp(lambda gate, up: _unit(gate, up, w.bias, rule.clamp), *_hidden(x_rows, w))
        back = jnp.dot(dy_rows, w.down.T, preferred_element_type=jnp.float32)
        dscale = jnp.sum(back * hidden, axis=-1)
        dgate, dup = unit_back(back * scale)
        if dbias is not None:
            dbias = dbias.at[layer, expert].add(jnp.stack([jnp.sum(dgate, axis=0), jnp.sum(dup, axis=0)]))
        back_through = [(part.astype(x.dtype), own) for part, own in ((dgate, w.gate), (dup, w.up))]
        dx_rows = sum(jnp.dot(part, w.T, preferred_element_type=jnp.float32) for part, w in back_through)
        dw_in = jnp.stack([jnp.dot(x_rows.T, part, preferred_element_type=jnp.float32) for part, _ in back_through])
        scaled = (hidden * scale).astype(x.dtype)
        dw_out = jnp.dot(scaled.T, dy_rows, preferred_element_type=jnp.float32)
        dx = dx.at[tokens].add(dx_rows, mode="drop", unique_indices=True)
        dweights = dweights.at[tokens, expert].add(dscale, mode="drop", unique_indices=True)
        return dx, dweights, dgate_up.at[layer, expert].add(dw_in), ddown.at[layer, expert].add(dw_out), dbias

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), saved[:-1])
    grads = _for_each_block(plan, block_sizes(x.shape[0]), visit, zeros)
    return (*jax.tree.map(lambda g, a: g.astype(a.dtype), grads, saved[:-1]), None)


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _ragged(rule, x, weights, gate_up, down, bias, layer):
    gate_up, down = (layer_weights(w, layer, x.dtype) for w in (gate_up, down))
    plan = sort_assignments(weights, top_k=rule.top_k)
    counts = jnp.diff(plan.ends, prepend=0)
    in_turn = gate_up.reshape(-1, *gate_up.shape[2:])  # gate and up of expert 0, gate and up of expert 1, ...
    counts_of = (jnp.stack(pair, axis=1).reshape(-1) for pair in ((counts, 0 * counts), (0 * counts, counts)))
    rows = x.at[plan.tokens].get(mode="fill", fill_value=0)
    gate, up = (jax.lax.ragged_dot(rows, in_turn, own).astype(jnp.float32) for own in counts_of)
    row = jnp.arange(len(plan.tokens))[:, None]
    own = None if bias is None else layer_of(bias, layer)[jnp.minimum(jnp.sum(plan.ends <= row, axis=1), len(down) - 1)]
    hidden = _unit(gate, up, own, rule.clamp)
    y = jax.lax.ragged_dot(hidden.astype(x.dtype), down, counts).astype(jnp.float32)
    y = y * plan.weights[:, None].astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[plan.tokens].add(y, mode="drop").astype(x.dtype)


def _native(rule, *arrays):
    x = arrays[0]
    native.prepare(x.dtype.name)
    if x.shape[0] > native.max_tokens(x.dtype.name):
        return _blocks(rule, *arrays)
    return _native_few(rule, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native_few(rule, x, weights, gate_up, down, bias, layer):
    return native.native_experts(x, weights, gate_up, down, bias, layer, clamp=rule.clamp)


_native_few.defvjp(lambda rule, *saved: (_native_few(rule, *saved), saved), _blocks_bwd)


def _dense(rule, x, weights, gate_up, down, bias, layer):
    gate_up, down = (layer_weights(w, layer, x.dtype) for w in (gate_up, down))
    both = jnp.einsum("td,ecdf->tecf", x, gate_up, preferred_element_type=jnp.float32)
    hidden = _unit(both[:, :, 0], both[:, :, 1], None if bias is None else layer_of(bias, layer), rule.clamp)
    hidden = hidden.astype(x.dtype).astype(jnp.float32)
    y = jnp.einsum("tef,efd->ted", hidden, down.astype(jnp.float32))
    return jnp.sum(y * weights[:, :, None].astype(jnp.float32), axis=1).astype(x.dtype)


_BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "blocks": _blocks,
    "ragged": _ragged,
    "native": _native,
    "dense": _dense,
}


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
    return _BACKENDS[backend](GroupedSwiGLUConfig(top_k, clamp), jnp.asarray(x), weights, gate_up, down, bias, layer)

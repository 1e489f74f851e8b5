"""Grouped SwiGLU over blocks of rows of one expert, on any platform.

Tokens are sorted by expert and cut in blocks. Loops visit the full blocks first, then each expert's remaining rows in
the smallest block that holds them; their trip counts follow the routing.
"""

# Dims: T tokens, D width, E experts, F expert width, A maximum number of assignments, R rows of a block.
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmoe.ops.grouped_matmul.assignments import ExpertAssignments, sort_assignments
from jaxmoe.ops.grouped_matmul.experts import biased_unit, expert_swiglu, expert_weights, hidden_activations

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


def _compute(rule, x, weights, gate_up, down, bias, layer):
    plan = sort_assignments(weights, top_k=rule.top_k)

    def visit(out, expert, tokens, weights):
        rows = x.at[tokens].get(mode="clip")
        y = expert_swiglu(rows, expert_weights(gate_up, down, bias, layer, expert), rule.clamp)
        return out.at[tokens].add(y * weights[:, None].astype(jnp.float32), mode="drop", unique_indices=True)

    out = _for_each_block(plan, block_sizes(x.shape[0]), visit, jnp.zeros(x.shape, jnp.float32))
    return out.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_swiglu(rule, *arrays):
    return _compute(rule, *arrays)


def _forward(rule, *saved):
    return _compute(rule, *saved), saved


def backward(rule, saved, dy):
    """Compute gradients block by block in float32 sums, and recompute the activations."""
    x, weights, gate_up, down, bias, layer = saved
    plan = sort_assignments(weights, top_k=rule.top_k)
    dy = dy.astype(x.dtype)

    def visit(carry, expert, tokens, weights):
        dx, dweights, dgate_up, ddown, dbias = carry
        scale = weights[:, None].astype(jnp.float32)
        x_rows, dy_rows = x.at[tokens].get(mode="clip"), dy.at[tokens].get(mode="fill", fill_value=0)
        w = expert_weights(gate_up, down, bias, layer, expert)
        hidden, unit_back = jax.vjp(
            lambda gate, up: biased_unit(gate, up, w.bias, rule.clamp), *hidden_activations(x_rows, w)
        )
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


grouped_swiglu.defvjp(_forward, backward)

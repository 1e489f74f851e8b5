"""The compiled MoE layer costs what its active experts cost, counted product by product and trip by trip."""

from __future__ import annotations

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.grouped_matmul import grouped_swiglu
from jaxmoe.ops.grouped_matmul.assignments import sort_assignments
from jaxmoe.ops.grouped_matmul.blocks import block_sizes, plan_blocks
from jaxmoe.ops.grouped_matmul.experts import ExpertWeights, swiglu_one
from tests.aot.flops import matmuls

NUM_EXPERTS, TOP_K, WIDTH, FFN = 32, 4, 64, 24
ROW_FLOPS = 6 * WIDTH * FFN  # gate, up and down of one token in one expert


def compiled_products(num_tokens: int, backend: str, dtype):
    experts = 1, NUM_EXPERTS
    shapes = [(num_tokens, WIDTH), (num_tokens, NUM_EXPERTS), (*experts, 2, WIDTH, FFN), (*experts, FFN, WIDTH)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = jax.jit(lambda *a: grouped_swiglu(*a, top_k=TOP_K, backend=backend)).lower(*arguments).compile()
    return matmuls(program.as_text())


def trips_by_size(num_tokens: int) -> Counter[int]:
    """How often the loops over blocks of each size run, for tokens that choose their experts evenly."""
    rng = np.random.default_rng(0)
    weights = np.zeros((num_tokens, NUM_EXPERTS), np.float32)
    for token in range(num_tokens):
        weights[token, rng.permutation(NUM_EXPERTS)[:TOP_K]] = 0.25
    sizes = block_sizes(num_tokens)
    blocks = plan_blocks(sort_assignments(jnp.asarray(weights), top_k=TOP_K).ends, sizes)
    trips = Counter({size: int(blocks.rest_ends[i] - blocks.rest_starts[i]) for i, size in enumerate(sizes)})
    trips[sizes[-1]] += int(blocks.full_ends[-1])
    return trips


def rows_of(product) -> int:
    """Rows of the block a product belongs to: gate and up sum over the width, down over the experts' width."""
    columns = {WIDTH: FFN, FFN: WIDTH}[product.depth]
    return math.prod(product.result_shape) // columns


def flops_of_one_row(dtype) -> float:
    """What XLA counts for a block of one row of 16 bits, which holds no product; less one for each weight, which it
    counts for widening it."""
    shapes = [(WIDTH,), (WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH)]
    program = (
        jax.jit(lambda x, *w: swiglu_one(x, ExpertWeights(*w)))
        .lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
        .compile()
    )
    return program.cost_analysis()["flops"] - 3 * WIDTH * FFN


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, pytest.param(8, marks=pytest.mark.sweep), 32, 512])
def test_products_run_are_those_of_the_active_experts(dtype, num_tokens):
    trips = trips_by_size(num_tokens)
    flops_by_rows: Counter[int] = Counter()
    for product in compiled_products(num_tokens, "blocks", dtype):
        flops_by_rows[rows_of(product)] += product.flops
    largest = max(trips)
    run = 0.0
    for size, count in trips.items():
        flops = size * ROW_FLOPS
        if size == 1 and dtype == jnp.bfloat16:
            flops = flops_of_one_row(dtype)
        else:  # one loop a size, two of the largest: full blocks, and rests
            assert flops_by_rows.pop(size) == flops * (2 if size == largest else 1)
        run += count * flops
    assert not flops_by_rows  # and no product besides
    assert 1.0 <= run / (num_tokens * TOP_K * ROW_FLOPS) <= 1.3


def test_ragged_dot_hides_the_cost_of_every_expert_on_cpu():
    """What the block loop is there to avoid, seen by the same count."""
    total = sum(product.flops for product in compiled_products(512, "ragged", jnp.float32))
    assert total >= NUM_EXPERTS * 512 * TOP_K * ROW_FLOPS

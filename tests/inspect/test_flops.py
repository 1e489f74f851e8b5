"""The compiled MoE layer costs what its active experts cost, counted product by product and trip by trip."""

from __future__ import annotations

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.inspect.flops import products
from jaxmoe.ops.grouped import block_sizes, grouped_swiglu, plan_blocks, sort_assignments

NUM_EXPERTS, TOP_K, WIDTH, FFN = 32, 4, 64, 24
ROW_FLOPS = 6 * WIDTH * FFN  # gate, up and down of one token in one expert


def compiled_products(num_tokens: int, kind: str, dtype):
    shapes = [(num_tokens, WIDTH), (num_tokens, NUM_EXPERTS), (NUM_EXPERTS, WIDTH, 2, FFN), (NUM_EXPERTS, FFN, WIDTH)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = jax.jit(lambda *a: grouped_swiglu(*a, top_k=TOP_K, kind=kind)).lower(*arguments).compile()
    return products(program.as_text())


def trips_by_size(num_tokens: int, itemsize: int) -> Counter[int]:
    """How often the loops over blocks of each size run, for tokens that choose their experts evenly."""
    rng = np.random.default_rng(0)
    weights = np.zeros((num_tokens, NUM_EXPERTS), np.float32)
    for token in range(num_tokens):
        weights[token, rng.permutation(NUM_EXPERTS)[:TOP_K]] = 0.25
    sizes = block_sizes(num_tokens, itemsize)
    blocks = plan_blocks(sort_assignments(jnp.asarray(weights), top_k=TOP_K).ends, sizes)
    trips = Counter({size: int(blocks.rest_ends[i] - blocks.rest_starts[i]) for i, size in enumerate(sizes)})
    trips[sizes[-1]] += int(blocks.full_ends[-1])
    return trips


def rows_of(product) -> int:
    """Rows of the block a product belongs to: gate and up sum over the width, down over the experts' width."""
    columns = {WIDTH: 2 * FFN, FFN: WIDTH}[product.depth]
    return math.prod(product.result_shape) // columns


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "limit"),
    [
        *[(jnp.float32, 1, 1.3), (jnp.float32, 8, 1.3), (jnp.float32, 32, 1.3), (jnp.float32, 512, 1.3)],
        # In 16 bits a lone row is computed as two (ops/grouped.py), which shows where most experts have one row.
        *[(jnp.bfloat16, 1, 2.0), (jnp.bfloat16, 8, 1.5), (jnp.bfloat16, 32, 1.3), (jnp.bfloat16, 512, 1.3)],
    ],
)
def test_products_run_are_those_of_the_active_experts(dtype, num_tokens, limit):
    trips = trips_by_size(num_tokens, jnp.dtype(dtype).itemsize)
    flops_by_rows: Counter[int] = Counter()
    for product in compiled_products(num_tokens, "blocks", dtype):
        flops_by_rows[rows_of(product)] += product.flops
    largest = max(trips)
    for size in trips:  # one loop a size, two of the largest: full blocks, and rests
        assert flops_by_rows.pop(size) == size * ROW_FLOPS * (2 if size == largest else 1)
    assert not flops_by_rows  # and no product besides
    run = sum(count * size * ROW_FLOPS for size, count in trips.items())
    assert 1.0 <= run / (num_tokens * TOP_K * ROW_FLOPS) <= limit


def test_ragged_dot_hides_the_cost_of_every_expert_on_cpu():
    """What the block loop is there to avoid, seen by the same count."""
    total = sum(product.flops for product in compiled_products(512, "ragged", jnp.float32))
    assert total >= NUM_EXPERTS * 512 * TOP_K * ROW_FLOPS

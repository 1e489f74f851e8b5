"""The grouped experts: every implementation gives the values and the gradients of the dense oracle."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import SwiGLUClamp
from jaxmoe.ops.grouped_matmul import BACKENDS, grouped_swiglu
from jaxmoe.ops.grouped_matmul.assignments import sort_assignments
from jaxmoe.ops.grouped_matmul.blocks import block_sizes, plan_blocks

from .stacks import LAYER, stacked
from .test_linear import compiler_found

WIDTH, FFN, NUM_EXPERTS, TOP_K = 16, 12, 8, 2
FAST_BACKENDS = tuple(name for name in BACKENDS if name not in ("dense", "native"))  # native: test_grouped_native.py
ROUTINGS = ("spread", "some experts empty", "all on one expert", "some tokens inactive", "no token active")


def planned_rows(ends, sizes: tuple[int, ...]):
    """Rows of all blocks, padding included: the cost, beside ends[-1] routed rows."""
    blocks = plan_blocks(jnp.asarray(ends), sizes)
    rests = jnp.sum((blocks.rest_ends - blocks.rest_starts) * jnp.array(sizes))
    return blocks.full_ends[-1] * sizes[-1] + rests


def routing(name: str, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Combine weights [T, E], zero where a token does not visit an expert."""
    weights = np.zeros((num_tokens, NUM_EXPERTS), np.float32)
    for token in range(num_tokens):
        if name == "no token active" or (name == "some tokens inactive" and token % 3 == 0):
            continue
        reachable = NUM_EXPERTS - 3 if name == "some experts empty" else NUM_EXPERTS
        chosen = [3] if name == "all on one expert" else rng.choice(reachable, TOP_K, replace=False)
        weights[token, chosen] = rng.uniform(0.2, 1.0, len(chosen))
    return weights


def arguments(name: str, num_tokens: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(num_tokens, WIDTH)).astype(np.float32)
    gate_up = rng.normal(size=(NUM_EXPERTS, 2, WIDTH, FFN)).astype(np.float32)
    down = rng.normal(size=(NUM_EXPERTS, FFN, WIDTH)).astype(np.float32)
    return x, routing(name, num_tokens, rng), stacked(gate_up), stacked(down)


@partial(jax.jit, static_argnames="backend")
def value_and_grads(arrays, cotangent, backend):
    """Result, and its gradients with the weights' masked to the experts visited (only those are ever used)."""

    def value(*arrays):
        y = grouped_swiglu(*arrays, LAYER, top_k=TOP_K, backend=backend)
        return jnp.vdot(y, cotangent), y

    (_, y), grads = jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    dx, dweights, dgate_up, ddown = grads
    return y, dx, jnp.where(arrays[1] != 0, dweights, 0), dgate_up, ddown


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, pytest.param(7, marks=pytest.mark.sweep), 300, 700])
@pytest.mark.parametrize("name", ROUTINGS)
def test_values_and_gradients_are_those_of_the_oracle(name, num_tokens, backend):
    arrays = arguments(name, num_tokens)
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    wanted = value_and_grads(arrays, cotangent, "dense")
    got = value_and_grads(arrays, cotangent, backend)
    for part, expected, found in zip(("y", "dx", "dweights", "dgate_up", "ddown"), wanted, got, strict=True):
        limit = 2e-6 * max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=limit, err_msg=part)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_tokens_that_visit_no_expert_come_out_zero(backend):
    arrays = arguments("some tokens inactive", 30)
    y = grouped_swiglu(*arrays, LAYER, top_k=TOP_K, backend=backend)
    np.testing.assert_array_equal(y[::3], 0)
    assert np.all(np.any(np.asarray(y[1::3]) != 0, axis=1))


@pytest.mark.parametrize("name", ROUTINGS)
def test_assignments_are_every_routed_pair_once(name):
    weights = routing(name, 40, np.random.default_rng(3))
    tokens, scales, ends = (np.asarray(part) for part in sort_assignments(jnp.asarray(weights), top_k=TOP_K))
    starts = np.concatenate([[0], ends[:-1]])
    pairs = [(int(t), e) for e in range(NUM_EXPERTS) for t in tokens[starts[e] : ends[e]]]
    assert pairs == [(t, e) for e in range(NUM_EXPERTS) for t in np.flatnonzero(weights[:, e])]
    np.testing.assert_array_equal(scales[: ends[-1]], [weights[pair] for pair in pairs])
    np.testing.assert_array_equal(tokens[ends[-1] :], 40)
    np.testing.assert_array_equal(scales[ends[-1] :], 0)


@pytest.mark.parametrize("num_tokens", [1, 3, 31, 300, 5000])
def test_block_sizes_rise_and_fit(num_tokens):
    sizes = block_sizes(num_tokens)
    assert list(sizes) == sorted(set(sizes))
    assert 1 <= sizes[0] <= sizes[-1] <= num_tokens


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=9), sizes=st.sampled_from([(1,), (1, 2, 3, 4), (4, 8)]))
def test_every_routed_row_lies_in_exactly_one_block(counts, sizes):
    ends = np.cumsum(counts).astype(np.int32)
    blocks = jax.tree.map(np.asarray, plan_blocks(jnp.asarray(ends), sizes))
    full = np.diff(blocks.full_ends, prepend=0)
    rest = np.zeros(len(counts), int)
    for index, size in enumerate(sizes):
        for expert in blocks.by_size[blocks.rest_starts[index] : blocks.rest_ends[index]]:
            assert rest[expert] == 0
            rest[expert] = size
    held = full * sizes[-1] + rest
    assert (held >= counts).all()
    assert all(
        r == 0 or r - (c % sizes[-1]) < max(np.diff(sizes, prepend=0)) for r, c in zip(rest, counts, strict=True)
    )
    assert held.sum() == planned_rows(jnp.asarray(ends), sizes)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 512])
def test_planned_rows_stay_near_the_routed_ones(num_tokens):
    """32 experts, 4 a token, drawn evenly: blocks hold at most 1.3 times the rows that are routed."""
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(32)[:4] for _ in range(num_tokens)])
    ends = jnp.asarray(np.cumsum(np.bincount(chosen.ravel(), minlength=32)), jnp.int32)
    assert num_tokens * 4 == ends[-1] <= planned_rows(ends, block_sizes(num_tokens)) <= 1.3 * num_tokens * 4


@partial(jax.jit, static_argnames=("backend", "clamp"))
def biased_value_and_grads(arrays, bias, cotangent, backend, clamp):
    def value(x, weights, gate_up, down, bias):
        y = grouped_swiglu(x, weights, gate_up, down, LAYER, bias, top_k=TOP_K, clamp=clamp, backend=backend)
        return jnp.vdot(y, cotangent), y

    (_, y), grads = jax.value_and_grad(value, argnums=(0, 2, 3, 4), has_aux=True)(*arrays, bias)
    return y, *grads


@pytest.mark.parametrize(
    ("num_tokens", "clamp"),
    [
        pytest.param(1, None, marks=pytest.mark.sweep),
        (1, SwiGLUClamp(limit=1.5)),
        pytest.param(30, None, marks=pytest.mark.sweep),
        pytest.param(30, SwiGLUClamp(limit=1.5), marks=pytest.mark.sweep),
        (300, None),
        pytest.param(300, SwiGLUClamp(limit=1.5), marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "dense"])
def test_biases_and_clamps(backend, num_tokens, clamp):
    """The oracle takes every token through each of its experts by itself."""
    if backend == "native" and not compiler_found():
        return
    arrays = arguments("some experts empty", num_tokens)
    bias = stacked(np.random.default_rng(2).normal(size=(NUM_EXPERTS, 2, FFN)).astype(np.float32))
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    found = biased_value_and_grads(arrays, bias, cotangent, backend, clamp)
    x, weights, gate_up, down = (np.asarray(part, np.float64) for part in arrays)
    expected = np.zeros(x.shape)
    for token, expert in zip(*np.nonzero(weights), strict=True):
        gate, up = np.einsum("d,cdf->cf", x[token], gate_up[LAYER, expert]) + bias[LAYER, expert]
        if clamp is not None:
            gate, up = np.minimum(gate, clamp.limit), np.clip(up, -clamp.limit, clamp.limit) + 1
        hidden = gate / (1 + np.exp(-(clamp.alpha if clamp else 1) * gate)) * up
        expected[token] += weights[token, expert] * (hidden @ down[LAYER, expert])
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    wanted = biased_value_and_grads(arrays, bias, cotangent, "dense", clamp)
    for name, part, expected in zip(("y", "dx", "dgate_up", "ddown", "dbias"), found, wanted, strict=True):
        limit = 2e-6 * max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=limit, err_msg=name)

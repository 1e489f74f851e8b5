"""The native experts give what dense ones give, whatever tokens stand beside; their gradients are those of blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.grouped_matmul import grouped_swiglu

from .stacks import LAYER, stacked
from .test_linear import compiler_found


def arguments(num_tokens: int, num_experts: int, ffn: int, routing: str, dtype):
    rng = np.random.default_rng(0)
    width, top_k = 40, 2
    weights = np.zeros((num_tokens, num_experts), np.float32)
    for token in range(num_tokens):
        if routing == "none":
            continue
        chosen = [1] if routing == "one" else rng.choice(num_experts, top_k, replace=False)
        weights[token, chosen] = rng.uniform(0.2, 1, len(chosen))
    x, gate_up, down = (
        rng.normal(0, 0.5, shape)
        for shape in ((num_tokens, width), (num_experts, 2, width, ffn), (num_experts, ffn, width))
    )
    x, weights, gate_up, down = (jnp.asarray(a, dtype) for a in (x, weights, gate_up, down))
    return [x, weights, stacked(gate_up), stacked(down), LAYER]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("routing", ["spread", "one", "none"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "ffn"), [(1, 8, 24), (7, 3, 130), (40, 8, 64), (450, 4, 16), (2, 2, 600)]
)
def test_native_is_dense(num_tokens, num_experts, ffn, routing, dtype):
    arrays = arguments(num_tokens, num_experts, ffn, routing, dtype)
    if not compiler_found(dtype):
        return
    run = jax.jit(grouped_swiglu, static_argnames=("top_k", "backend"))
    wanted = np.asarray(run(*arrays, top_k=2, backend="dense"), np.float32)
    found = np.asarray(run(*arrays, top_k=2, backend="native"), np.float32)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(found, wanted, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ffn", [24, 600])
def test_the_tokens_beside_change_no_bit_of_a_token(ffn, dtype):
    if not compiler_found(dtype):
        return
    x, weights, gate_up, down, layer = arguments(300, 3, ffn, "spread", dtype)
    run = jax.jit(lambda x, weights: grouped_swiglu(x, weights, gate_up, down, layer, top_k=2, backend="native"))
    together = np.asarray(run(x, weights), np.float32)
    for first, count in ((0, 1), (5, 3), (10, 20), (299, 1), (60, 200)):
        alone = run(x[first : first + count], weights[first : first + count])
        np.testing.assert_array_equal(np.asarray(alone, np.float32), together[first : first + count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_far_from_zero_stay_finite(dtype):
    """silu(-1000) is 0 and silu(1000) is 1000, whatever exp overflows to."""
    if not compiler_found(dtype):
        return
    x, weights = jnp.ones((2, 16), dtype), jnp.array([[1, 0], [0, 1]], dtype)
    gate_up = jnp.stack([jnp.full((2, 16, 32), value, dtype) for value in (-60, 60)])
    gate_up = gate_up.at[:, 1].set(1)
    found = jax.jit(lambda *a: grouped_swiglu(*a, top_k=1, backend="native"))(
        x, weights, gate_up[None], jnp.ones((1, 2, 32, 16), dtype)
    )
    np.testing.assert_allclose(np.asarray(found, np.float32)[:, 0], [0, 960 * 16 * 32], rtol=0.01)


def test_gradients_are_those_of_blocks():
    arrays = arguments(7, 3, 12, "spread", "float32")
    if not compiler_found("float32"):
        return

    def gradients(backend):
        value = lambda *a: jnp.sum(jnp.sin(grouped_swiglu(*a, top_k=2, backend=backend)))  # noqa: E731
        return jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))(*arrays)

    for found, wanted in zip(gradients("native"), gradients("blocks"), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, float(jnp.abs(wanted).max())))

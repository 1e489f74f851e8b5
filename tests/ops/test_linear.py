"""The compiled CPU kernel multiplies as XLA does, whatever the shapes; its gradients are XLA's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.linear import linear

from .stacks import LAYER, stacked


def arrays(rows: int, depth: int, columns: int, dtype: str, *, transposed: bool):
    rng = np.random.default_rng(0)
    shape = (columns, depth) if transposed else (depth, columns)
    return tuple(jnp.asarray(rng.normal(0, 1, s), dtype) for s in ((rows, depth), shape))


def compiler_found(dtype: str = "float32") -> bool:
    """Whether there is a C++ compiler; without one, checks what a user is told."""
    if native.find_compiler() is not None:
        native.prepare(dtype)
        return True
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        native.prepare(dtype)
    return False


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "result"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 13, 16, 17, 200])
@pytest.mark.parametrize(("depth", "columns"), [(3, 1), (72, 70), (200, 5000)])
def test_native_multiplies_as_the_numbers_say(rows, depth, columns, dtype, result, transposed):
    if not compiler_found(dtype):
        return
    x, w = arrays(rows, depth, columns, dtype, transposed=transposed)
    found = linear(x, stacked(w), LAYER, backend="native", transposed=transposed, dtype=result)
    assert found.dtype == result
    exact = [np.asarray(a, np.float64) for a in (x, w)]
    wanted = exact[0] @ (exact[1].T if transposed else exact[1])
    tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[result]
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=tolerance * depth**0.5)


def test_numbers_that_are_none_stay_so():
    if not compiler_found("bfloat16"):
        return
    x = jnp.array([[np.nan, 1.0], [1.0, np.inf]], "bfloat16")
    found = np.asarray(linear(x, jnp.ones((1, 2, 16), "bfloat16"), backend="native"), np.float32)
    assert np.isnan(found[0]).all()
    assert np.isposinf(found[1]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_valid", [0, 1, 5, 40])
def test_rows_past_those_used_are_zero_and_change_nothing(num_valid, transposed):
    if not compiler_found():
        return
    x, w = arrays(40, 24, 70, "float32", transposed=transposed)
    run = jax.jit(partial(linear, backend="native", transposed=transposed))
    found, whole = run(x.at[num_valid:].set(jnp.nan), stacked(w), LAYER, num_valid), run(x, stacked(w), LAYER)
    np.testing.assert_array_equal(found[:num_valid], whole[:num_valid])
    np.testing.assert_array_equal(found[num_valid:], 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_xla(transposed):
    if not compiler_found():
        return
    x, w = arrays(5, 24, 40, "float32", transposed=transposed)

    def gradients(backend):
        value = lambda x, w: jnp.sum(jnp.sin(linear(x, stacked(w), LAYER, backend=backend, transposed=transposed)))  # noqa: E731
        return jax.jit(jax.grad(value, argnums=(0, 1)))(x, w)

    for found, wanted in zip(gradients("native"), gradients("xla"), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_many_rows_are_left_to_xla_where_it_is_faster(monkeypatch):
    if not compiler_found():
        return
    monkeypatch.setattr(native, "max_tokens", lambda dtype: 8)
    for rows, kernel in ((8, True), (9, False)):
        x, w = arrays(rows, 8, 8, "float32", transposed=False)
        text = jax.jit(partial(linear, backend="native")).lower(x, w[None]).as_text()
        assert ("jaxmoe_linear" in text) == kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(40, 70), (1030, 513), (64, 5000)])
def test_the_rows_beside_change_no_bit_of_a_row(depth, columns, transposed, dtype):
    if not compiler_found(dtype):
        return
    most = min(400, native.max_tokens(dtype))  # beyond it a processor's own bfloat16 products serve
    x, w = arrays(most, depth, columns, dtype, transposed=transposed)
    run = jax.jit(partial(linear, backend="native", transposed=transposed, dtype="float32"))
    w = w[None]
    together = np.asarray(run(x, w))
    for first, rows in ((0, 1), (3, 5), (7, 16), (most // 4, 17), (most - 1, 1), (3 * most // 8, 5 * most // 8)):
        np.testing.assert_array_equal(run(x[first : first + rows], w), together[first : first + rows])

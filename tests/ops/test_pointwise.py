"""Native norms, rotations, gates and routing mean what XLA's do, whatever rows stand beside; gradients are XLA's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.pointwise import (
    BACKENDS,
    RouteRule,
    gated_rows,
    gated_unit,
    rms_norm,
    rotate,
    route,
    scale_by_rms,
    sum_of_squares,
)

from .test_linear import compiler_found

ROWS = 700


def numbers(seed: int, *shape: int, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), dtype)


def norm(backend, dtype, width):
    weight = numbers(1, width, dtype=dtype)
    return (numbers(0, ROWS, width, dtype=dtype),), lambda x: rms_norm(x, weight, eps=1e-5, backend=backend)


def squares(backend, dtype, width):
    return (numbers(0, ROWS, 1, 3, width, dtype=dtype),), partial(sum_of_squares, backend=backend)


def norm_by_squares(backend, dtype, width):
    weight, means = numbers(1, 3, width, dtype=dtype), jnp.square(numbers(2, ROWS, 1))
    x = numbers(0, ROWS, 1, 3, width, dtype=dtype)
    return (x, means), lambda x, means: scale_by_rms(x, weight, means, eps=1e-5, backend=backend)


def rotation(backend, dtype, width):
    x, angles = numbers(0, ROWS, 1, 3, 2, 2 * width, dtype=dtype), numbers(1, ROWS, 1, width)
    return (x, jnp.cos(angles), jnp.sin(angles)), partial(rotate, backend=backend)


def unit(backend, dtype, width):
    both = numbers(0, ROWS, width, dtype=dtype), numbers(1, ROWS, width, dtype=dtype)
    return both, partial(gated_unit, backend=backend)


def rows(backend, dtype, width):
    return (numbers(0, ROWS, width, dtype=dtype), numbers(1, ROWS, 1, dtype=dtype)), partial(
        gated_rows, backend=backend
    )


def routing(backend, dtype, width):
    del dtype  # always float32
    valid = jnp.arange(ROWS) % 5 > 0
    choose = partial(route, rule=RouteRule(top_k=min(3, width), normalize=width % 2 == 0), backend=backend)
    return (numbers(0, ROWS, width), valid), lambda *arrays: choose(*arrays)[0]


def limited_routing(backend, dtype, width):
    """Among the best two of as many groups as divide the experts."""
    num_groups = next(n for n in (4, 3, 2, 1) if width % n == 0)
    (logits, valid), _ = routing(backend, dtype, width)
    top_groups = min(2, num_groups)
    rule = RouteRule(
        top_k=min(3, width // num_groups * top_groups), normalize=True, num_groups=num_groups, top_groups=top_groups,
        experts_per_group_score=2,
    )  # fmt: skip
    return (logits, valid), lambda *a: route(*a, rule=rule, backend=backend)[0]


def biased_routing(backend, dtype, width):
    """The same by sigmoids, with a bias in the choice that makes some of it negative."""
    (logits, valid), _ = limited_routing(backend, dtype, width)
    num_groups = next(n for n in (4, 3, 2, 1) if width % n == 0)
    rule = RouteRule(
        top_k=1,
        normalize=True,
        scoring="sigmoid",
        scaling=2.5,
        num_groups=num_groups,
        top_groups=1,
        experts_per_group_score=2,
    )
    bias = jnp.linspace(-2, 0.5, width)
    return (logits, valid), lambda *a: route(*a, bias, rule=rule, backend=backend)[0]


def shares(backend, dtype, width):
    rule = RouteRule(top_k=1, normalize=False)
    (logits, valid), _ = routing(backend, dtype, width)
    return (logits,), lambda logits: route(logits, valid[: len(logits)], rule=rule, backend=backend)[1]


WORK = [norm, squares, norm_by_squares, rotation, unit, rows, routing, limited_routing, biased_routing, shares]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 6, 33, 128])
@pytest.mark.parametrize("work", WORK)
def test_both_kinds_mean_the_same(work, width, dtype):
    if not compiler_found(dtype):
        return
    wanted, found = (
        np.asarray(jax.jit(run)(*arrays), np.float32)
        for arrays, run in (work(backend, dtype, width) for backend in BACKENDS)
    )
    tolerance = 1e-5 if dtype == "float32" else 0.02
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [6, 128])
@pytest.mark.parametrize("work", WORK)
def test_the_rows_beside_change_no_bit_of_a_native_row(work, width, dtype):
    if not compiler_found(dtype):
        return
    arrays, run = work("native", dtype, width)
    run = jax.jit(run)
    together = np.asarray(run(*arrays), np.float32)
    for count in (1, 2, 9, 64, 300):
        alone = run(*(array[:count] for array in arrays))
        np.testing.assert_array_equal(np.asarray(alone, np.float32), together[:count])


@pytest.mark.parametrize("work", [norm, rotation, unit, rows])
def test_gradients_are_those_of_xla(work):
    if not compiler_found():
        return

    def gradients(backend):
        arrays, run = work(backend, "float32", 6)
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(run(*a))), argnums=range(len(arrays))))(*arrays)

    for found, wanted in zip(gradients("native"), gradients("xla"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

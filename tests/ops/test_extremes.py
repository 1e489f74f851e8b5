"""Zeros, infinities, NaN and numbers at the ends of float32: native kernels give what their XLA references give."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import MaskSpec, causal_attention
from jaxmoe.ops.grouped_matmul import grouped_swiglu
from jaxmoe.ops.linear import linear
from jaxmoe.ops.paged_attention import paged_attention
from jaxmoe.ops.pointwise import (
    RouteRule,
    gated_rows,
    gated_unit,
    rms_norm,
    rotate,
    route,
    scale_by_rms,
    sum_of_squares,
)

from .stacks import LAYER, stacked
from .test_linear import compiler_found
from .test_sampling import sampled_by

INF, NAN = np.inf, np.nan
NUMBERS = np.array(
    [0.0, -0.0, 1e-45, -1e-38, 1.0, -20.0, -50.0, 87.2, -87.2, 88.5, -88.5, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30, 3e38,
     -3e38, INF, -INF, NAN], np.float32,
)  # fmt: skip
WIDTH = 6


def one_in_a_row(seed: int, width: int = WIDTH) -> np.ndarray:
    """Rows of ordinary numbers, each with one of NUMBERS among them."""
    rows = np.random.default_rng(seed).normal(0, 1.5, (len(NUMBERS), width)).astype(np.float32)
    rows[np.arange(len(NUMBERS)), np.arange(len(NUMBERS)) % width] = NUMBERS
    return rows


def whole_rows(width: int = WIDTH) -> np.ndarray:
    """Rows of one of NUMBERS alone."""
    return np.repeat(NUMBERS[:, None], width, axis=1)


ROWS = np.concatenate([one_in_a_row(0), whole_rows(), np.array([[-1, -0.0, 0, -0.0, 0, -1]], np.float32)])
ANGLES = np.full((len(ROWS), 1, 3), 0.6, np.float32)
PAIRS = tuple(np.array(np.meshgrid(NUMBERS, NUMBERS), np.float32).reshape(2, -1, 1))


def routed(rule: RouteRule, bias: np.ndarray | None = None):
    return lambda backend: (partial(route, rule=rule, backend=backend), (ROWS, np.arange(len(ROWS)) % 7 > 0, bias))


def experts(backend: str):
    x = one_in_a_row(1)
    rng = np.random.default_rng(2)
    gate_up, down = rng.normal(0, 1, (3, 2, WIDTH, 5)), rng.normal(0, 1, (3, 5, WIDTH))
    weights = np.tile(np.array([[0.5, 0, 2]], np.float32), (len(x), 1))
    weights[::3, 0] = NAN
    run = partial(grouped_swiglu, top_k=2, backend="blocks" if backend == "xla" else backend)
    return run, (x, weights, *(stacked(jnp.asarray(a, jnp.float32)) for a in (gate_up, down)), LAYER)


def pages(backend: str, *, cache_dtype: str = "float32", sinks: np.ndarray | None = None):
    """Three tokens on pages of two; the keys of each block hold one of NUMBERS, or values do."""
    count, rng = len(NUMBERS), np.random.default_rng(3)
    keys, values = rng.normal(0, 1, (2, 1, 4 * count, 1, 2, 1)).astype(np.float32)
    first = 2 * np.arange(count)
    keys[0, first, 0, 0, 0] = keys[0, first, 0, 1, 0] = keys[0, first + 1, 0, 0, 0] = NUMBERS
    values[0, 2 * count + first, 0, 0, 0] = NUMBERS
    block_table = np.arange(4 * count, dtype=np.int32).reshape(-1, 2)
    q = np.ones((2 * count, 1, 1, 2, 1), np.float32)
    q[:, :, :, 1] = -1
    scales = () if cache_dtype == "float32" else (np.ones((1, 4 * count, 1, 2), np.float32),) * 2
    run = partial(paged_attention, mask_spec=MaskSpec(scale=1.0), backend="loop" if backend == "xla" else backend)
    pool = (*(jnp.asarray(part).astype(cache_dtype) for part in (keys, values)), *scales)
    where = np.full(2 * count, 2, np.int32), np.ones(2 * count, np.int32)
    return run, (q, pool, block_table, *where, 0, sinks)


def matmuls(backend: str):
    w = np.random.default_rng(4).normal(0, 1, (2, WIDTH, 3)).astype(np.float32)
    w[LAYER, 0, 0] = 0
    return partial(linear, backend=backend), (one_in_a_row(5), w, LAYER)


WORK = {
    "norm": lambda backend: (partial(rms_norm, eps=1e-6, backend=backend), (ROWS, np.ones(WIDTH, np.float32))),
    "norm without eps": lambda backend: (
        partial(rms_norm, eps=0.0, backend=backend),
        (ROWS, np.ones(WIDTH, np.float32)),
    ),
    "squares": lambda backend: (partial(sum_of_squares, backend=backend), (ROWS[:, None],)),
    "norm by squares": lambda backend: (
        partial(scale_by_rms, eps=0.0, backend=backend),
        (PAIRS[0][:, None], np.ones(1, np.float32), np.abs(PAIRS[1])),
    ),
    "rotation": lambda backend: (partial(rotate, backend=backend), (ROWS[:, None, None], ANGLES, ANGLES)),
    "gated unit": lambda backend: (partial(gated_unit, backend=backend), PAIRS),
    "gated rows": lambda backend: (partial(gated_rows, backend=backend), PAIRS),
    "softmax": routed(RouteRule(top_k=2, normalize=False)),
    "softmax, normalized": routed(RouteRule(top_k=2, normalize=True)),
    "logits": routed(RouteRule(top_k=3, normalize=True, top_k_of="logits")),
    "sigmoid of logits": routed(RouteRule(top_k=2, normalize=False, scoring="sigmoid", top_k_of="logits")),
    "sigmoid": routed(RouteRule(top_k=2, normalize=True, scoring="sigmoid"), np.full(WIDTH, 0.5, np.float32)),
    "groups": routed(
        RouteRule(top_k=3, normalize=True, scoring="sigmoid", num_groups=3, top_groups=2, experts_per_group_score=2),
        np.array([0.5, -INF, 0, 0.1, -0.2, 0], np.float32),
    ),
    "experts": experts,
    "attention": pages,
    "attention with sinks": partial(pages, sinks=np.array([[-1e30, 5e3]], np.float32)),
    "attention over float8": partial(pages, cache_dtype="float8_e4m3fn"),
    "matmuls": matmuls,
}


@pytest.mark.parametrize("work", WORK)
def test_native_kernels_meet_extremes_as_xla_does(work):
    if not compiler_found():
        return
    found, wanted = (
        jax.tree.leaves(jax.jit(run)(*arrays)) for run, arrays in (WORK[work](backend) for backend in ("native", "xla"))
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-37)


def test_both_samplers_say_which_logits_are_not_finite():
    """NaN, plus infinity or minus infinity alone make the log-probability NaN, whatever biases and bans do to them."""
    if not compiler_found():
        return
    ordinary = np.random.default_rng(6).normal(0, 2, 12).astype(np.float32)
    logits = np.stack([ordinary] * 7)
    logits[1, 3], logits[2, 3], logits[3], logits[4, 3:], logits[5] = NAN, INF, -INF, -INF, 3e38
    logits[6, 11] = NAN
    for temperature in (0.0, 0.7):
        row = (temperature, 3, 0.9, 0.0, 7)
        for backend in ("native", "xla"):
            tokens, logprobs, *_ = sampled_by(
                backend, logits, [row] * 7, [0] * 7, bias_token_ids=[[3, 0, 2**31 - 1]] * 7, bias=[[0.0, 5.0, 0.0]] * 7,
                num_stop_ids=[1] * 7, min_tokens_until=[9] * 7,
            )  # fmt: skip
            assert np.isnan(logprobs).tolist() == [False, True, True, True, False, False, True]
            assert ((tokens >= 0) & (tokens < 12)).all()


def test_scores_below_any_mask_are_still_a_softmax():
    """Keys that lie after a query weigh nothing, however low the scores of those it sees."""
    q, k = np.full((1, 4, 1, 1, 1), 1e16, np.float32), np.full((1, 4, 1, 1), -1e16, np.float32)
    v = np.arange(1.0, 5, dtype=np.float32).reshape(1, 4, 1, 1)
    found = causal_attention(q, k, v, mask_spec=MaskSpec(scale=1.0), query_block=4)
    np.testing.assert_allclose(np.ravel(found), [1, 1.5, 2, 2.5])

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import cached_attention, causal_attention, write_token


def oracle(q, k, v, window):
    """One query at a time, in float64: q [B,S,K,G,H], k and v [B,S,K,H]."""
    out = np.zeros(q.shape)
    for b, s, kv, g in np.ndindex(q.shape[:4]):
        first = 0 if window is None else max(0, s - window + 1)
        scores = k[b, first : s + 1, kv].astype(np.float64) @ q[b, s, kv, g] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, kv, g] = weights / weights.sum() @ v[b, first : s + 1, kv]
    return out


def draw(length):
    rng = np.random.default_rng(0)
    q = rng.normal(0, 1, (2, length, 2, 3, 8)).astype(np.float32)
    k, v = rng.normal(0, 1, (2, 2, length, 2, 8)).astype(np.float32)
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("query_block", [4, 7, 256])
def test_causal_attention(window, query_block):
    q, k, v = draw(18)
    got = causal_attention(q, k, v, window=window, query_block=query_block)
    np.testing.assert_allclose(got, oracle(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_a_token_against_its_cache_is_the_last_row_of_the_prompt(window):
    q, k, v = draw(18)
    expected = oracle(q, k, v, window)
    positions = jnp.array([17, 6])
    capacity = 32
    keys, values = (np.full((2, 2, capacity, 8), 1e3, np.float32) for _ in range(2))  # what lies beyond must not matter
    keys[:, :, :18], values[:, :, :18] = k.swapaxes(1, 2), v.swapaxes(1, 2)
    query = np.stack([q[0, 17], q[1, 6]])[:, None]
    got = np.asarray(cached_attention(query, keys, values, positions, window=window))
    np.testing.assert_allclose(got[:, 0], np.stack([expected[0, 17], expected[1, 6]]), atol=1e-5)


def test_writing_a_token_changes_its_place_alone():
    cache = np.random.default_rng(0).normal(0, 1, (3, 2, 10, 4)).astype(np.float32)
    new = np.ones((3, 1, 2, 4), np.float32)
    expected = cache.copy()
    for row, at in enumerate((0, 9, 4)):
        expected[row, :, at] = 1
    np.testing.assert_array_equal(jax.jit(write_token)(cache, new, jnp.array([0, 9, 4])), expected)

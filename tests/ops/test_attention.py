from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.ops.attention import causal_attention


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

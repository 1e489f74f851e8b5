from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.ops.attention import MaskSpec, causal_attention

SCALE = 8**-0.5


def first_seen(at: int, window: int | None, chunk: int | None) -> int:
    """The first position that the query at one position sees."""
    of_window = 0 if window is None else max(0, at - window + 1)
    return of_window if chunk is None else max(of_window, at - at % chunk)


def oracle(q, k, v, window, chunk=None, sinks=None, scale=SCALE):
    """One query at a time, in float64: q [B,S,K,G,H], k [B,S,K,H], v [B,S,K,V], sinks [K,G]."""
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, s, kv, g in np.ndindex(q.shape[:4]):
        first = first_seen(s, window, chunk)
        scores = k[b, first : s + 1, kv].astype(np.float64) @ q[b, s, kv, g] * scale
        scores = scores if sinks is None else np.append(scores, sinks[kv, g])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, s, kv, g] = weights[: s + 1 - first] @ v[b, first : s + 1, kv]
    return out


def draw(length, value_dim=8):
    rng = np.random.default_rng(0)
    q = rng.normal(0, 1, (2, length, 2, 3, 8)).astype(np.float32)
    k = rng.normal(0, 1, (2, length, 2, 8)).astype(np.float32)
    return q, k, rng.normal(0, 1, (2, length, 2, value_dim)).astype(np.float32)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("query_block", [4, 7, 256])
def test_causal_attention(window, query_block):
    q, k, v = draw(18)
    got = causal_attention(q, k, v, mask_spec=MaskSpec(scale=SCALE, window=window), query_block=query_block)
    np.testing.assert_allclose(got, oracle(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize(("window", "chunk"), [(None, 1), (None, 5), (None, 64), (3, 5)])
@pytest.mark.parametrize("query_block", [4, 256])
def test_chunks_sinks_and_values_of_another_width(window, chunk, query_block):
    q, k, v = draw(18, value_dim=5)
    sinks = np.random.default_rng(1).normal(0, 2, (2, 3)).astype(np.float32)
    mask_spec = MaskSpec(scale=0.7, window=window, chunk=chunk)
    got = causal_attention(q, k, v, sinks, mask_spec=mask_spec, query_block=query_block)
    np.testing.assert_allclose(got, oracle(q, k, v, window, chunk, sinks, 0.7), atol=1e-5)

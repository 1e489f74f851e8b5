from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.ops.sample import SamplingArrays, filter_logits, sample

VOCAB = 12


def rows(*values: tuple[float, int, float, float, int]) -> SamplingArrays:
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32)
    return SamplingArrays(
        *(jnp.array(column, dtype) for column, dtype in zip(zip(*values, strict=True), dtypes, strict=True))
    )


def oracle_kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that stay, one at a time, as the definitions read."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda token: -scaled[token])
    kept = order[: top_k or len(order)]
    weights = np.exp(scaled[kept] - scaled[kept].max())
    share = weights / weights.sum()
    stays, total = [], 0.0
    for token, p in zip(kept, share, strict=True):
        if not stays or ((top_p == 1 or total < top_p) and p >= min_p * share[0]):
            stays.append(token)
        total += p
    return set(stays)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.05, 0.37, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.11, 0.52]),
)
def test_the_tokens_kept_are_those_of_the_definitions(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    filtered = filter_logits(jnp.array(logits[None]), rows((temperature, top_k, top_p, min_p, 0)))
    assert set(np.flatnonzero(np.isfinite(np.asarray(filtered)[0]))) == oracle_kept(
        logits, temperature, top_k, top_p, min_p
    )


def draw(logits, values, positions):
    tokens, logprobs = sample(jnp.array(logits), rows(*values), jnp.array(positions, jnp.int32), jnp.bool_(True))
    return np.asarray(tokens), np.asarray(logprobs)


def test_greedy_and_logprobs():
    logits = np.random.default_rng(0).normal(0, 3, (4, VOCAB)).astype(np.float32)
    tokens, logprobs = draw(logits, [(0.0, 0, 1.0, 0.0, 0)] * 4, [0] * 4)
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    expected = logits.max(1) - np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    count = 4000
    tokens, _ = draw(np.repeat(logits, count, 0), [(1.0, 0, 1.0, 0.0, 7)] * count, list(range(count)))
    shares = np.bincount(tokens, minlength=4) / count
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_a_row_draws_the_same_whatever_its_neighbours():
    logits = np.random.default_rng(1).normal(0, 2, (3, VOCAB)).astype(np.float32)
    values = [(1.0, 0, 0.9, 0.0, seed) for seed in (5, 6, 7)]
    together, _ = draw(logits, values, [3, 9, 27])
    alone = [draw(logits[i : i + 1], values[i : i + 1], [p])[0][0] for i, p in enumerate((3, 9, 27))]
    assert together.tolist() == alone


@pytest.mark.parametrize("change", [dict(seed=8), dict(position=4)])
def test_another_seed_or_position_draws_anew(change):
    flat = np.zeros((1, 4096), np.float32)
    first, _ = draw(flat, [(1.0, 0, 1.0, 0.0, 7)], [3])
    other, _ = draw(flat, [(1.0, 0, 1.0, 0.0, change.get("seed", 7))], [change.get("position", 3)])
    assert first[0] != other[0]

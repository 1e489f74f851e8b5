"""Routers choose the experts that the definitions and the families name; replicas of an expert take turns."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.families import read_config
from jaxmoe.ops.pointwise import BACKENDS, RouteRule, route, to_physical

from ..tiny.cases import CASES_BY_NAME
from .test_linear import compiler_found

WIDTH, EXPERTS = 5, 8


@pytest.mark.parametrize("normalize", [True, False])
def test_route(normalize):
    rng = np.random.default_rng(1)
    x, router = rng.normal(0, 1, (6, WIDTH)).astype(np.float32), rng.normal(0, 1, (WIDTH, EXPERTS)).astype(np.float32)
    valid = jnp.array([True, True, False, True, True, True])
    weights, probabilities = route(x @ router, valid, rule=RouteRule(top_k=3, normalize=normalize))
    softmax = np.exp(x @ router) / np.exp(x @ router).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, softmax, rtol=1e-4)
    for token in range(6):
        best = np.argsort(-softmax[token])[:3] if valid[token] else np.array([], int)
        expected = np.zeros(EXPERTS)
        expected[best] = softmax[token, best] / (softmax[token, best].sum() if normalize else 1)
        np.testing.assert_allclose(weights[token], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("best", "top_groups"), [(1, 1), (1, 2), (2, 2), (5, 3)])
def test_groups_limit_where_a_token_goes(best, top_groups):
    """Of four groups of two experts; the oracle goes through them one by one."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (16, EXPERTS)).astype(np.float32)
    rule = RouteRule(top_k=2, normalize=False, num_groups=4, top_groups=top_groups, experts_per_group_score=best)
    weights, _ = route(logits, jnp.ones(16, bool), rule=rule)
    for token, row in enumerate(np.exp(logits) / np.exp(logits).sum(1, keepdims=True)):
        scores = [sum(sorted(row[2 * g : 2 * g + 2])[-best:]) for g in range(4)]
        among = [e for g in np.argsort(scores)[-top_groups:] for e in (2 * g, 2 * g + 1)]
        chosen = sorted(among, key=lambda e: -row[e])[:2]
        np.testing.assert_allclose(weights[token], np.where(np.isin(np.arange(EXPERTS), chosen), row, 0), rtol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_takes_part_in_the_choice_alone(normalize):
    """DeepSeek-V3's routing: sigmoids, of four groups the two whose best two experts have the largest sum."""
    rng = np.random.default_rng(6)
    logits, bias = rng.normal(0, 1, (16, EXPERTS)).astype(np.float32), rng.normal(0, 1, EXPERTS).astype(np.float32)
    rule = RouteRule(
        top_k=3,
        normalize=normalize,
        scoring="sigmoid",
        scaling=2.5,
        num_groups=4,
        top_groups=2,
        experts_per_group_score=2,
    )
    weights, scores = route(logits, jnp.ones(16, bool), bias, rule=rule)
    sigmoid = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(scores, sigmoid, rtol=1e-5)
    for token, row in enumerate(sigmoid):
        choice = row + bias
        among = [e for g in np.argsort(choice.reshape(4, 2).sum(1))[-2:] for e in (2 * g, 2 * g + 1)]
        chosen = sorted(among, key=lambda e: -choice[e])[:3]
        expected = np.where(np.isin(np.arange(EXPERTS), chosen), row, 0) * 2.5
        np.testing.assert_allclose(weights[token], expected / (row[chosen].sum() if normalize else 1), rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=6, max_size=6), min_size=1, max_size=9),
    places=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    first=st.integers(0, 5),
)
def test_a_token_visits_the_replica_whose_turn_it_is_of_each_of_its_experts(weights, places, first):
    """Every expert stands somewhere, some in several places, and some places (6) are empty."""
    expert = np.array([*range(6), *places])
    count = np.array([sum(expert == e) for e in expert])
    nth = np.array([sum(expert[:at] == e) for at, e in enumerate(expert)])
    physical_expert_map = np.stack([expert, nth, np.where(expert == 6, 0, count)]).astype(np.int32)
    weights = np.array(weights, np.float32)
    found = np.asarray(
        to_physical(jnp.asarray(weights), jnp.asarray(physical_expert_map), first + jnp.arange(len(weights)))
    )
    for token, row in enumerate(weights):
        for e in range(6):
            at = np.flatnonzero(expert == e)
            assert sorted(found[token, at]) == sorted([row[e]] + [0] * (len(at) - 1))
            assert found[token, at[(first + token) % len(at)]] == row[e]
        assert not found[token, expert == 6].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_expert(backend):
    if backend == "native" and not compiler_found():
        return
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0], [0.0, -1e30, -1e30, -1e30]])
    weights, _ = route(logits, jnp.array([True, True]), rule=RouteRule(top_k=2, normalize=True), backend=backend)
    np.testing.assert_allclose(weights, [[0, 0.5, 0.5, 0], [1, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "logits", "bias", "weights"),
    [
        # By transformers 5.24, float32. Sigmoids from 17 up are 1: Llama-4 chooses by logits.
        ("llama4_text_scout", [17, 18, 30, 19, 0, -5], None, {2: 1.0}),
        ("llama4_text_scout", [-120, -30, -31, -50, -60, -70], None, {1: 9.3576e-14}),
        # Shares of a softmax far below the best are 0: GPT-OSS chooses by logits.
        ("gpt_oss_window", [200, 0, 50, 90, 100, -5], None, {0: 1.0, 4: 0.0, 3: 0.0}),
        ("gpt_oss_window", [3, 2, 1, 0, 2.5, -5], None, {0: 0.5064804, 4: 0.30719593, 1: 0.18632373}),
        # A sum of sigmoids gets 1e-20 added before it divides (DeepSeek-V3, GLM-4.5).
        ("deepseek_v3_halves", [-50, -51, -52, -53, -60, -61], 0.5, {0: 0.0188, 1: 0.0069}),
        ("glm4_moe_groups", [-50, -51, -52, -60, -60, -61], 0.5, {0: 0.0188, 1: 0.0069}),
        # Mixtral and Qwen choose by softmax, as published.
        ("qwen3_moe_sparse_step", [2, 1, 0, -1, 3, -2], None, {4: 0.66524096, 0: 0.24472847, 1: 0.09003057}),
    ],
)  # fmt: skip
def test_a_family_routes_as_published(name, logits, bias, weights, backend):
    if backend == "native" and not compiler_found():
        return
    moe = read_config(CASES_BY_NAME[name].config).moe
    biases = None if bias is None else jnp.full(len(logits), bias)
    found, _ = route(
        jnp.array([logits], jnp.float32), jnp.array([True]), biases, rule=RouteRule.of(moe), backend=backend
    )
    expected = [weights.get(expert, 0.0) * moe.routed_scaling for expert in range(len(logits))]
    np.testing.assert_allclose(found[0], expected, rtol=5e-3, atol=1e-30)

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.ops.dispatch import DISPATCH_KINDS, combine, dispatch
from jaxmoe.ops.route import route

from ..conftest import mesh_of

RANKS, TOKENS, WIDTH, EXPERTS = 4, 3, 5, 8


@pytest.mark.parametrize("kind", DISPATCH_KINDS)
def test_every_rank_sees_each_token_with_the_weights_of_its_experts_and_sums_come_back(kind):
    """Each expert multiplies by its own number, so the result says which expert saw which token with which weight."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (RANKS * TOKENS, WIDTH)).astype(np.float32)
    weights = rng.uniform(0, 1, (RANKS * TOKENS, EXPERTS)) * (rng.uniform(0, 1, (RANKS * TOKENS, EXPERTS)) < 0.3)
    factors = np.arange(1, EXPERTS + 1, dtype=np.float32)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(f"expert={RANKS}"), in_specs=(P("expert"),) * 3, out_specs=P("expert"))
    def layer(x, weights, factors):
        everyone, mine = dispatch(x, weights, axis="expert", num_ranks=RANKS, kind=kind)
        return combine(everyone * (mine @ factors)[:, None], axis="expert", num_ranks=RANKS, kind=kind)

    np.testing.assert_allclose(
        layer(x, weights.astype(np.float32), factors), x * (weights @ factors)[:, None], rtol=1e-5
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_route(normalise):
    rng = np.random.default_rng(1)
    x, router = rng.normal(0, 1, (6, WIDTH)).astype(np.float32), rng.normal(0, 1, (WIDTH, EXPERTS)).astype(np.float32)
    active = jnp.array([True, True, False, True, True, True])
    weights, probabilities = route(x @ router, active, top_k=3, normalise=normalise)
    softmax = np.exp(x @ router) / np.exp(x @ router).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, softmax, rtol=1e-4)
    for token in range(6):
        best = np.argsort(-softmax[token])[:3] if active[token] else np.array([], int)
        expected = np.zeros(EXPERTS)
        expected[best] = softmax[token, best] / (softmax[token, best].sum() if normalise else 1)
        np.testing.assert_allclose(weights[token], expected, rtol=1e-4, atol=1e-7)

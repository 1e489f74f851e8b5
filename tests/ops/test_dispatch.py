"""Every implementation sends tokens where their experts are and sums what comes back."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.ops.dispatch import BACKENDS, HIERARCHICAL, DispatchSpec, combine, dispatch
from jaxmoe.ops.pointwise import RouteRule, route

from ..conftest import mesh_of

RANKS, TOKENS, WIDTH, EXPERTS = 4, 3, 5, 8


def exchange_of(backend: str, max_ranks: int = RANKS) -> DispatchSpec:
    return DispatchSpec(axes=("expert",), num_ranks=RANKS, max_ranks=max_ranks, backend=backend, platform="cpu")


def layer_of_factors(backend: str, max_ranks: int = RANKS):
    """Each expert multiplies by its own number, so the result says which expert saw which token with which weight; and
    how many tokens with a weight each rank got."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(f"expert={RANKS}"), in_specs=(P("expert"),) * 3, out_specs=P("expert"))
    def layer(x, weights, factors):
        exchange = exchange_of(backend, max_ranks)
        everyone, mine, sent = dispatch(x, weights, exchange)
        got = jnp.sum(sent.came.sizes if sent else jnp.int32(len(everyone)))[None]
        return combine(everyone * (mine @ factors)[:, None], sent, exchange), got

    return layer


def _weights(routed: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (RANKS * TOKENS, EXPERTS)).astype(np.float32)
    if routed == "some":
        return weights * (rng.uniform(0, 1, weights.shape) < 0.3)
    chosen = {"none": [], "one": [5], "one rank": [4, 5], "all": range(EXPERTS)}[routed]
    return weights * np.isin(np.arange(EXPERTS), chosen)


@pytest.mark.parametrize("routed", ["some", "none", "one", "one rank", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_sees_each_token_with_the_weights_of_its_experts_and_sums_come_back(backend, routed):
    x = np.random.default_rng(1).normal(0, 1, (RANKS * TOKENS, WIDTH)).astype(np.float32)
    weights, factors = _weights(routed), np.arange(1, EXPERTS + 1, dtype=np.float32)
    y, _ = layer_of_factors(backend)(x, weights, factors)
    np.testing.assert_allclose(y, x * (weights @ factors)[:, None], rtol=1e-5)


@pytest.mark.parametrize("routed", ["some", "none", "one", "one rank", "all"])
@pytest.mark.parametrize("mesh", ["expert=2,tensor=2", "data=2,expert=2", "expert=4,tensor=1"])
@pytest.mark.parametrize("backend", HIERARCHICAL)
def test_hierarchical_goes_along_one_axis_and_then_along_the_other(backend, mesh, routed):
    axes = ("data", "expert") if "data" in mesh else ("expert", "tensor")
    exchange = DispatchSpec(axes=axes, num_ranks=RANKS, max_ranks=RANKS, backend=backend, platform="cpu")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(mesh), in_specs=(P(axes),) * 3, out_specs=P(axes))
    def layer(x, weights, factors):
        everyone, mine, sent = dispatch(x, weights, exchange)
        return combine(everyone * (mine @ factors)[:, None], sent, exchange)

    x = np.random.default_rng(1).normal(0, 1, (RANKS * TOKENS, WIDTH)).astype(np.float32)
    weights, factors = _weights(routed), np.arange(1, EXPERTS + 1, dtype=np.float32)
    np.testing.assert_allclose(layer(x, weights, factors), x * (weights @ factors)[:, None], rtol=1e-5)
    compiled = layer.lower(x, weights, factors).compile().as_text()
    sends_counts = backend == "hierarchical_ragged" and "tensor=1" not in mesh  # how many rows come
    assert compiled.count(" all-to-all(") == (2 if "tensor=1" in mesh else 5 if sends_counts else 4)


@pytest.mark.parametrize("routed", ["some", "none", "one", "one rank", "all"])
def test_ragged_sends_a_token_once_to_each_rank_it_visits_and_nothing_else(routed):
    x, weights = np.ones((RANKS * TOKENS, WIDTH), np.float32), _weights(routed)
    _, got = layer_of_factors("ragged_all_to_all")(x, weights, np.ones(EXPERTS, np.float32))
    visits = (weights.reshape(-1, RANKS, EXPERTS // RANKS) != 0).any(axis=2)
    assert got.tolist() == visits.sum(axis=0).tolist()


def test_kinds_agree_to_the_last_bit_where_a_token_visits_few_ranks():
    """Two experts a token: room for two ranks is enough, and sums are taken in the order of the ranks."""
    rng = np.random.default_rng(2)
    x, factors = rng.normal(0, 1, (RANKS * TOKENS, WIDTH)).astype(np.float32), rng.normal(0, 1, EXPERTS)
    weights = np.zeros((RANKS * TOKENS, EXPERTS), np.float32)
    for row in weights:
        row[rng.choice(EXPERTS, 2, replace=False)] = rng.uniform(0.1, 1, 2)
    found = [layer_of_factors(backend, most)(x, weights, factors.astype(np.float32))[0] for backend, most in
             (("all_to_all", RANKS), ("ragged_all_to_all", 2))]  # fmt: skip
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_back_the_way_tokens_came(backend):
    x = np.random.default_rng(3).normal(0, 1, (RANKS * TOKENS, WIDTH)).astype(np.float32)
    weights, factors = _weights("some").astype(np.float32), np.arange(1, EXPERTS + 1, dtype=np.float32)
    loss = lambda layer: lambda x, w: jnp.sum(jnp.sin(layer(x, w)))  # noqa: E731
    found = jax.grad(loss(lambda x, w: layer_of_factors(backend)(x, w, factors)[0]), argnums=(0, 1))(x, weights)
    wanted = jax.grad(loss(lambda x, w: x * (w @ factors)[:, None]), argnums=(0, 1))(x, weights)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1] * (weights != 0), wanted[1] * (weights != 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_groups_of_a_rank_limit_the_ranks_that_a_token_is_sent_to(top_groups):
    """A group of experts on each rank, four experts a token: sent to as many ranks as there are groups, at most."""
    num_experts = 4 * RANKS
    rng = np.random.default_rng(5)
    logits, x = (rng.normal(0, 1, (RANKS * TOKENS, n)).astype(np.float32) for n in (num_experts, WIDTH))
    rule = RouteRule(top_k=4, normalize=True, num_groups=RANKS, top_groups=top_groups, experts_per_group_score=2)
    weights, _ = route(logits, jnp.ones(len(x), bool), rule=rule)
    factors = np.arange(1, num_experts + 1, dtype=np.float32)
    y, got = layer_of_factors("ragged_all_to_all", top_groups)(x, np.asarray(weights), factors)
    np.testing.assert_allclose(y, x * (np.asarray(weights) @ factors)[:, None], rtol=1e-5)
    assert int(got.sum()) <= RANKS * TOKENS * top_groups
    if top_groups == 1:
        assert int(got.sum()) == RANKS * TOKENS

"""The losses against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.train.loss import balance_loss, cross_entropy


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def balance_oracle(layer: np.ndarray, top_k: int) -> float:
    """Choice by choice, as Hugging Face counts: the share of tokens whose k-th choice an expert is, times its mean."""
    num_experts = layer.shape[-1]
    flat = layer.reshape(-1, num_experts)
    order = np.argsort(-flat, axis=-1, kind="stable")[:, :top_k]
    total = 0.0
    for choice in range(top_k):
        for expert in range(num_experts):
            total += np.mean(order[:, choice] == expert) * flat[:, expert].mean()
    return num_experts * total


def test_cross_entropy_is_minus_log_softmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 11)).astype(np.float32) * 4
    targets = rng.integers(0, 11, (2, 5)).astype(np.int32)
    wanted = -np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy(logits, targets), wanted, rtol=1e-5)


def test_cross_entropy_ignores_the_padding_of_the_vocabulary():
    logits = jnp.array([[[1.0, 2.0, -jnp.inf]]])
    grad = jax.grad(lambda logits: cross_entropy(logits, jnp.array([[0]])).sum())(logits)
    assert np.isfinite(grad).all()
    assert grad[0, 0, 2] == 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_that_of_numpy(top_k):
    rng = np.random.default_rng(top_k)
    layers = [softmax(rng.normal(size=(3, 7, 6))).astype(np.float32) for _ in range(4)]
    wanted = np.mean([balance_oracle(layer, top_k) for layer in layers])
    np.testing.assert_allclose(balance_loss(layers, top_k=top_k), wanted, rtol=1e-5)


def test_balance_loss_is_top_k_when_balanced_and_num_experts_when_collapsed():
    even = softmax(np.eye(8, dtype=np.float32)[None] * 1e-4)
    np.testing.assert_allclose(balance_loss([even], top_k=1), 1, rtol=1e-3)
    collapsed = np.zeros((1, 8, 8), np.float32)
    collapsed[..., 2] = 1
    np.testing.assert_allclose(balance_loss([collapsed], top_k=1), 8, rtol=1e-6)


def test_balance_loss_pushes_against_the_busy_expert():
    logits = jnp.zeros((1, 16, 4)).at[..., 1].set(0.5)
    grad = jax.grad(lambda logits: balance_loss([jax.nn.softmax(logits)], top_k=1))(logits)
    assert (grad[..., 1] > 0).all()
    assert (grad[..., [0, 2, 3]] < 0).all()


def test_balance_loss_needs_a_layer():
    with pytest.raises(ValueError, match="at least one MoE layer"):
        balance_loss([], top_k=1)

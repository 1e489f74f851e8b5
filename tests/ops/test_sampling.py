from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.ops.sampling import BACKENDS, SamplingArrays, SamplingFeatures, sample
from jaxmoe.ops.sampling.xla import adjust_logits, filter_logits

from .test_linear import compiler_found

VOCAB = 12


def rows(*values: tuple[float, int, float, float, int], **changes) -> SamplingArrays:
    """Temperature, top-k, top-p, min-p and seed of each row; changes: the other parts, off otherwise."""
    count = len(values)
    temperature, top_k, top_p, min_p, seed = (np.array(column) for column in zip(*values, strict=True))
    others = dict(
        repetition=np.ones(count), presence=np.zeros(count), frequency=np.zeros(count), prompt_length=np.zeros(count),
        bias_token_ids=np.full((count, 3), 2**31 - 1), bias=np.zeros((count, 3)), num_stop_ids=np.zeros(count),
        min_tokens_until=np.zeros(count), seed_high=np.zeros(count), token_bitmask=np.full((count, 128), -1),
    )  # fmt: skip
    parts = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed) | others | changes
    whole = ("top_k", "prompt_length", "bias_token_ids", "num_stop_ids", "min_tokens_until", "token_bitmask")
    dtypes = {"seed": jnp.uint32, "seed_high": jnp.uint32} | dict.fromkeys(whole, jnp.int32)
    return SamplingArrays(
        **{name: jnp.asarray(np.array(part).astype(dtypes.get(name, np.float32))) for name, part in parts.items()}
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


ALL = SamplingFeatures(*(jnp.bool_(True),) * 4)


@pytest.fixture(params=BACKENDS)
def draw(request):
    return partial(sampled_by, request.param)


def sampled_by(backend, logits, values, positions, history=None, features=ALL, **changes):
    """Tokens and logprobs, and the likeliest tokens with theirs. history: a page of tokens for every row."""
    if backend == "native" and not compiler_found():
        backend = "xla"
    history = np.zeros((len(logits), 4)) if history is None else history
    output = sample(
        jnp.array(logits), rows(*values, **changes), jnp.array(history, jnp.int32)[::-1],
        jnp.arange(len(history))[::-1, None], jnp.array(positions, jnp.int32), features, backend=backend,
    )  # fmt: skip
    return tuple(np.asarray(part) for part in output)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.sampled_from([1, VOCAB, 50]),
    temperature=st.sampled_from([0.0, 0.4, 1.3]),
    top_k=st.integers(0, VOCAB),
    top_p=st.sampled_from([0.3, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.11]),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-0.7, 0.0, 1.1]),
    frequency=st.sampled_from([0.0, 0.4]),
    banned=st.integers(0, 2),
    high=st.sampled_from([0, 1, 2**32 - 1]),
    masked=st.booleans(),
)
def test_both_kinds_draw_the_same(
    seed, vocab, temperature, top_k, top_p, min_p, repetition, presence, frequency, banned, high, masked
):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, vocab)).astype(np.float32)
    row = (temperature, top_k, top_p, min_p, seed)
    past = 2**31 - 1
    changes = dict(
        repetition=[repetition] * 3, presence=[presence] * 3, frequency=[frequency] * 3, prompt_length=[2, 0, 6],
        bias_token_ids=[[0, past, past], [vocab - 1, 0, past], [past] * 3], bias=rng.normal(0, 3, (3, 3)),
        num_stop_ids=[banned] * 3, min_tokens_until=[9, 9, 3], seed_high=[high] * 3,
    )  # fmt: skip
    if vocab == 1 and banned:
        return  # nothing is left to choose
    if masked:
        changes["token_bitmask"] = bitmasks(rng.random((3, vocab)) < 0.5)
    history = rng.integers(0, vocab, (3, 8))
    found, wanted = (
        sampled_by(backend, logits, [row] * 3, [5, 8, 7], history, **changes) for backend in ("native", "xla")
    )
    valid = np.isfinite(wanted[1])  # a row of which nothing may be sampled has no token
    assert valid.all() or masked
    np.testing.assert_array_equal(found[0][valid], wanted[0][valid])
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    np.testing.assert_array_equal(found[2], wanted[2])
    np.testing.assert_allclose(found[3], wanted[3], atol=1e-5)


def bitmasks(allowed: np.ndarray) -> np.ndarray:
    """allowed [B,V] as words of 32 bits [B,W], token t at bit t % 32 of word t // 32."""
    words = np.zeros((len(allowed), -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in np.argwhere(allowed):
        words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words.view(np.int32)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_only_tokens_of_the_bitmask_are_sampled_and_logprobs_stay_those_of_the_model(temperature, draw):
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (40, 70)).astype(np.float32)
    allowed = rng.random(logits.shape) < 0.2
    allowed[:, 63] = True  # the sign bit of a word
    row = [(temperature, 0, 1.0, 0.0, 7)] * 40
    positions = list(range(40))
    tokens, logprobs, top, _ = draw(logits, row, positions, token_bitmask=bitmasks(allowed))
    assert allowed[range(40), tokens].all()
    if not temperature:
        np.testing.assert_array_equal(tokens, np.where(allowed, logits, -np.inf).argmax(1))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(logprobs, exact[range(40), tokens], atol=1e-5)
    np.testing.assert_array_equal(top[:, 0], logits.argmax(1))
    free, *_ = draw(logits, row, positions)
    unmasked = ALL._replace(masked=jnp.bool_(False))
    skipped, *_ = draw(logits, row, positions, features=unmasked, token_bitmask=bitmasks(allowed))
    np.testing.assert_array_equal(skipped, free)
    assert (free != tokens).any()


def test_a_row_without_a_token_left_has_no_logprob_and_its_neighbors_do(draw):
    logits = np.zeros((3, VOCAB), np.float32)
    allowed = np.ones((3, VOCAB), bool)
    allowed[0] = False
    allowed[1] = np.arange(VOCAB) == 4  # which the row below bans
    bans = dict(bias_token_ids=[[4, 2**31 - 1, 2**31 - 1]] * 3, num_stop_ids=[1, 1, 1], min_tokens_until=[0, 9, 9])
    row = [(0.0, 0, 1.0, 0.0, 7)] * 3
    tokens, logprobs, *_ = draw(logits, row, [3] * 3, token_bitmask=bitmasks(allowed), **bans)
    assert np.isnan(logprobs).tolist() == [True, True, False]
    assert tokens[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("best", [[1.2, 1.0], [-1.0, -1.2]])
def test_a_repeated_token_becomes_less_likely_whatever_the_sign_of_its_logit(best, backend):
    logits = np.full((1, VOCAB), -9.0, np.float32)
    logits[0, :2] = best
    history = np.full((1, 8), 5)
    history[0, 2] = 0
    row = [(0.0, 0, 1.0, 0.0, 0)]
    for repetition, token in ((1.0, 0), (1.3, 1)):
        tokens, *_ = sampled_by(backend, logits, row, [8], history, repetition=[repetition], prompt_length=[8])
        assert tokens.tolist() == [token]


def test_greedy_and_logprobs(draw):
    logits = np.random.default_rng(0).normal(0, 3, (4, VOCAB)).astype(np.float32)
    tokens, logprobs, *_ = draw(logits, [(0.0, 0, 1.0, 0.0, 0)] * 4, [0] * 4)
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    expected = logits.max(1) - np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_draws_follow_the_distribution(draw):
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    count = 4000
    tokens, *_ = draw(np.repeat(logits, count, 0), [(1.0, 0, 1.0, 0.0, 7)] * count, list(range(count)))
    shares = np.bincount(tokens, minlength=4) / count
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_a_row_draws_the_same_whatever_its_neighbors(draw):
    logits = np.random.default_rng(1).normal(0, 2, (3, VOCAB)).astype(np.float32)
    values = [(1.0, 0, 0.9, 0.0, seed) for seed in (5, 6, 7)]
    together, *_ = draw(logits, values, [3, 9, 27])
    alone = [draw(logits[i : i + 1], values[i : i + 1], [p])[0][0] for i, p in enumerate((3, 9, 27))]
    assert together.tolist() == alone


@pytest.mark.parametrize("change", [dict(seed=8), dict(position=4), dict(high=1), dict(high=2**31)])
def test_another_seed_or_position_draws_anew(change, draw):
    flat = np.zeros((1, 4096), np.float32)
    first, *_ = draw(flat, [(1.0, 0, 1.0, 0.0, 7)], [3])
    row, position = (1.0, 0, 1.0, 0.0, change.get("seed", 7)), change.get("position", 3)
    other, *_ = draw(flat, [row], [position], seed_high=[change.get("high", 0)])
    assert first[0] != other[0]


def oracle_adjusted(logits, prompt, answer, repetition, presence, frequency, bias, banned):
    """The definitions, token by token."""
    found = logits.astype(np.float64)
    for token in range(len(found)):
        if token in prompt + answer:
            found[token] = found[token] / repetition if found[token] > 0 else found[token] * repetition
        found[token] -= presence * (token in answer) + frequency * answer.count(token)
        found[token] += bias.get(token, 0.0)
        if token in banned:
            found[token] = -np.inf
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    answer=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-0.7, 0.0, 1.1]),
    frequency=st.sampled_from([0.0, 0.4]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 1.5]), max_size=2),
    min_tokens=st.integers(0, 6),
)
def test_penalties_biases_and_bans_are_those_of_the_definitions(
    seed, prompt, answer, repetition, presence, frequency, bias, min_tokens
):
    logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    end = 5
    history = np.full((1, 14), 3)  # what lies beyond the known tokens counts for nothing
    known = prompt + answer
    history[0, : len(known)] = known
    bias_token_ids = [end, *bias, *[2**31 - 1] * (2 - len(bias))]
    row = rows(
        (0.0, 0, 1.0, 0.0, 0),
        repetition=[repetition],
        presence=[presence],
        frequency=[frequency],
        prompt_length=[len(prompt)],
        bias_token_ids=[bias_token_ids],
        bias=[[0.0, *bias.values(), *[0.0] * (2 - len(bias))]],
        num_stop_ids=[1],
        min_tokens_until=[len(prompt) + min_tokens],
    )
    found = adjust_logits(jnp.array(logits[None]), row, jnp.array(history), jnp.array([len(known)]))[0]
    banned = [end] if len(answer) < min_tokens else []
    expected = oracle_adjusted(logits, prompt, answer, repetition, presence, frequency, bias, banned)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_the_model_whatever_changes_the_choice(draw):
    logits = np.random.default_rng(4).normal(0, 3, (1, VOCAB)).astype(np.float32)
    order = (-logits[0]).argsort()
    tokens, logprobs, top, top_logprobs = draw(
        logits, [(0.0, 0, 1.0, 0.0, 0)], [0], bias_token_ids=[[order[0], 2**31 - 1, 2**31 - 1]], bias=[[-1000.0, 0, 0]]
    )
    exact = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert tokens[0] == order[1]
    np.testing.assert_allclose(logprobs[0], exact[order[1]], atol=1e-5)
    np.testing.assert_array_equal(top[0], order)
    np.testing.assert_allclose(top_logprobs[0], exact[order], atol=1e-5)


def test_what_nobody_wants_is_left_out(draw):
    logits = np.zeros((1, VOCAB), np.float32)
    nothing = SamplingFeatures(*(jnp.bool_(False),) * 4)
    row = [(1.0, 0, 1.0, 0.0, 7)]
    tokens, _, top, top_logprobs = draw(
        logits, row, [3], features=nothing, bias_token_ids=[[0, 1, 2]], bias=[[-9.0, -9.0, -9.0]]
    )
    assert tokens[0] == 0  # greedy, and without the bias
    assert not top.any()
    assert not top_logprobs.any()

"""Everything a request may ask of sampling, end to end, against the model's own scores and a token-by-token oracle."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from jaxmoe import AsyncEngine, RequestError, SamplingParams

from ..conftest import ONE_DEVICE

CASE = "qwen3_moe_norm"
MESH = "data=2,tensor=2,expert=2"
PROMPT = [1, 5, 9, 2, 6, 5, 3]
NEIGHBORS = [[3, 1, 4], [5, 8], [9, 7, 9, 3, 2]]


def greedy(tokens: int, **options) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **options)


@pytest.fixture(params=[ONE_DEVICE, MESH])
def llm(request, tiny_llm):
    return tiny_llm(CASE, request.param)


def expected_tokens(llm, params: SamplingParams) -> list[int]:
    """Token by token from the model's own logits, by the definitions."""
    known = list(PROMPT)
    for _ in range(params.max_tokens):
        logits = llm.last_logits([known])[0].astype(np.float64)
        answer = known[len(PROMPT) :]
        for token in set(known):
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(answer):
            logits[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        known.append(int(logits.argmax()))
    return known[len(PROMPT) :]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"presence_penalty": -2.0},
        {"logit_bias": {7: 100.0}},
    ],
    ids=str,
)
def test_penalties_and_biases_beside_neighbors_without(llm, options):
    params = greedy(10, **options)
    outputs = llm.generate([PROMPT, *NEIGHBORS], [params, *[greedy(10)] * 3])
    assert outputs[0].token_ids == expected_tokens(llm, params)
    alone = [llm.generate([prompt], greedy(10))[0].token_ids for prompt in NEIGHBORS]
    assert [out.token_ids for out in outputs[1:]] == alone


def test_a_shared_beginning_still_counts_for_penalties(tiny_llm):
    """The prompt is found in pages and not computed again; its tokens are known there too."""
    llm = tiny_llm(CASE, ONE_DEVICE)
    long = [PROMPT[i % 7] for i in range(40)]
    params = greedy(8, repetition_penalty=2.0)
    first, again = (llm.generate([long], params)[0].token_ids for _ in range(2))
    assert llm._core.scheduler.num_cached_tokens >= 32
    assert again == first
    assert first != llm.generate([long], greedy(8))[0].token_ids


def test_samples_of_one_request_are_those_of_their_seeds(llm):
    options = {"max_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    (out,) = llm.generate([PROMPT], SamplingParams(n=3, seed=7, **options))
    single = [llm.generate([PROMPT], SamplingParams(seed=7 + i, **options))[0] for i in range(3)]
    assert [sample.token_ids for sample in out.outputs] == [one.token_ids for one in single]
    assert len({tuple(sample.token_ids) for sample in out.outputs}) > 1
    assert out.token_ids == out.outputs[0].token_ids
    chunks = list(llm.stream([PROMPT], SamplingParams(n=3, seed=7, **options)))
    for index, sample in enumerate(out.outputs):
        assert [chunk.token_id for chunk in chunks if chunk.sample == index] == sample.token_ids


def test_samples_share_the_prompt(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    other, long = [[(i * step) % 40 for i in range(50)] for step in (3, 7)]
    llm.generate([other], greedy(2, n=4))  # makes room
    before = llm._core.scheduler.num_cached_tokens
    llm.generate([long], greedy(2, n=4))
    assert llm._core.scheduler.num_cached_tokens - before == 3 * 48


def test_stop_tokens_end_a_request_and_not_before_the_least_length(llm):
    free = llm.generate([PROMPT], greedy(12))[0].token_ids
    stop = free[3]
    (out,) = llm.generate([PROMPT], greedy(12, stop_token_ids=[stop]))
    assert out.token_ids == free[: free.index(stop) + 1]
    assert out.finish_reason == "stop"
    (out,) = llm.generate([PROMPT], greedy(12, stop_token_ids=[stop], min_tokens=7))
    assert stop not in out.token_ids[:7]
    assert len(out.token_ids) >= 7


def test_the_likeliest_tokens_are_those_of_the_logits(llm):
    (out,) = llm.generate([PROMPT], greedy(5, top_logprobs=4))
    known = list(PROMPT)
    for token, top in zip(out.token_ids, out.outputs[0].top_logprobs, strict=True):
        logits = llm.last_logits([known])[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert list(top) == (-logprobs).argsort()[:4].tolist()
        np.testing.assert_allclose(list(top.values()), logprobs[list(top)], atol=2e-4)
        known.append(token)
    assert llm.generate([PROMPT], greedy(5))[0].outputs[0].top_logprobs == []


@pytest.mark.parametrize("decode_steps", [1, 3])
def test_an_engine_streams_samples_and_all_of_this(tiny_llm, decode_steps):
    llm = tiny_llm(CASE, ONE_DEVICE)
    params = SamplingParams(
        max_tokens=7, n=2, temperature=0.8, seed=3, repetition_penalty=1.2, top_logprobs=2, ignore_eos=True
    )

    async def scene(engine):
        return [chunk async for chunk in engine.stream(PROMPT, params)]

    with AsyncEngine(
        llm, max_num_seqs=4, context=32, page_size=4, chunk_tokens=16, decode_steps=decode_steps
    ) as engine:
        chunks = asyncio.run(scene(engine))
        assert engine.stats()["pages_in_use"] == 0
    (out,) = llm.generate([PROMPT], params)
    for index, sample in enumerate(out.outputs):
        mine = [chunk for chunk in chunks if chunk.sample == index]
        assert [chunk.token_id for chunk in mine] == sample.token_ids
        assert [list(chunk.top_logprobs) for chunk in mine] == [list(top) for top in sample.top_logprobs]
        assert [chunk.finish_reason for chunk in mine] == [None] * 6 + ["length"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n=0 must lie in"), ({"min_tokens": 200}, "min_tokens=200 must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"), ({"presence_penalty": float("nan")}, "presence"),
        ({"frequency_penalty": 1e9}, "frequency_penalty"), ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has 'a'"), ({"logit_bias": {1: float("inf")}}, r"logit_bias\[1\]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": "ab"}, "stop_token_ids"),
        ({"stop": ["a", "b\ud800"]}, r"stop has 'b\\ud800', which is not valid Unicode"),
        ({"top_logprobs": 21}, "top_logprobs=21"), ({"max_tokens": 2**31}, "max_tokens=2147483648"),
        ({"logit_bias": {1: 10**400}}, r"logit_bias\[1\]"), ({"logit_bias": {1: 1e300}}, r"logit_bias\[1\]"),
        ({"temperature": 1e-38}, "temperature=1e-38"), ({"temperature": 10**400}, "temperature="),
        ({"repetition_penalty": 1e-50}, "repetition_penalty=1e-50"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(options, said):
    with pytest.raises(RequestError, match=said):
        SamplingParams(**options)


def test_what_is_asked_for_is_copied():
    bias, stop = {1: 2.0}, [7]
    params = SamplingParams(logit_bias=bias, stop_token_ids=stop)
    bias[2], stop[0] = 3.0, 8
    assert (params.logit_bias, params.stop_token_ids) == ({1: 2.0}, (7,))


def test_a_small_temperature_is_greedy_and_a_ban_outweighs_a_bias(llm):
    free = llm.generate([PROMPT], greedy(6))[0].token_ids
    assert llm.generate([PROMPT], greedy(6, temperature=1e-6, seed=3))[0].token_ids == free
    (out,) = llm.generate([PROMPT], greedy(6, stop_token_ids=[7], logit_bias={7: 1000.0}, min_tokens=4))
    assert 7 not in out.token_ids[:4]
    assert out.token_ids[4:] == [7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids has token id 1000000"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has token id 1000000"),
        ({"stop_token_ids": [1] * 385}, "may have"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_before_anything_runs(tiny_llm, options, said):
    with pytest.raises(RequestError, match=said):
        tiny_llm(CASE, ONE_DEVICE).generate([PROMPT], SamplingParams(**options))


def test_values_that_clients_send(tiny_llm):
    """top_k=-1 keeps all tokens; max_tokens=None goes on to the end of the context; seeds have 64 bits."""
    llm, random_params = tiny_llm(CASE, ONE_DEVICE), {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True}
    seeds = (-(2**63), -1, 0, 1, 2**33 + 1, 2**63, 2**64 - 1)
    params = [SamplingParams(seed=seed, **random_params) for seed in seeds]
    params += [SamplingParams(top_k=-1, seed=1, **random_params), SamplingParams(max_tokens=None, ignore_eos=True)]
    *outputs, minus, whole = llm.generate([PROMPT] * len(params), params)
    assert minus == replace(outputs[3], index=minus.index)
    assert len(whole.token_ids) == llm.config.max_position_embeddings - len(PROMPT)
    assert whole.finish_reason == "length"
    assert [out.seed for out in outputs] == list(seeds)
    assert len({tuple(out.token_ids) for out in outputs}) == len(seeds) - 2
    assert outputs[:2] == [replace(outputs[5], index=0), replace(outputs[6], index=1)]  # the same 64 bits


def test_a_seed_that_nobody_gave_is_drawn_anew_and_told(tiny_llm):
    llm, random_params = tiny_llm(CASE, ONE_DEVICE), {"max_tokens": 8, "temperature": 1.0, "n": 2, "ignore_eos": True}
    first, other = llm.generate([PROMPT] * 2, SamplingParams(**random_params))
    (again,) = llm.generate([PROMPT], SamplingParams(**random_params))
    assert len({out.seed for out in (first, other, again)}) == 3
    assert len({tuple(s.token_ids) for out in (first, other, again) for s in out.outputs}) == 6
    assert [sample.seed for sample in again.outputs] == [again.seed, again.seed + 1]
    chunks = list(llm.stream([PROMPT], SamplingParams(**random_params | {"n": 1, "seed": again.outputs[1].seed})))
    assert [chunk.token_id for chunk in chunks] == again.outputs[1].token_ids
    assert {chunk.seed for chunk in chunks} == {again.outputs[1].seed}


def test_three_hundred_biases_are_taken_beside_stop_tokens(tiny_llm):
    """OpenAI's API allows so many. All tokens but one are banned by them."""
    llm = tiny_llm(CASE, ONE_DEVICE)
    vocab = llm.config.vocab_size
    assert vocab == 131
    bias = {token: -1000.0 for token in range(vocab) if token != 77}
    (out,) = llm.generate([PROMPT], greedy(3, logit_bias=bias, stop_token_ids=list(range(60))))
    assert out.token_ids == [77] * 3
    SamplingParams(logit_bias=dict.fromkeys(range(300), 1.0), stop_token_ids=range(80)).check_token_ids(
        vocab_size=1000, num_eos=4
    )

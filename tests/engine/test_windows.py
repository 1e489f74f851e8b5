"""Pages behind windows that every layer has: they are freed while a request runs, and no token changes for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.engine.core import EngineCore, EngineRequest
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.scheduler import StepScheduler

from ..conftest import ONE_DEVICE, mesh_of

CASE = "mistral_window"  # of 9 tokens, in all of its layers
PROMPTS = [[7, 3, 11, 5, 2] * 4, [1, 9, 8], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]]
# 15 pages of 4 tokens: less than one request's 80, and three of at most (8 + 16 + 2) // 4 + 1 = 7 pages hold 21.
SCHEDULER_CONFIG = SchedulerConfig(
    num_ranks=1,
    max_num_seqs=4,
    chunk_tokens=16,
    block_tokens=16,
    num_pages=15,
    page_size=4,
    context=80,
    decode_steps=4,
    window=9,
)


@pytest.fixture(scope="module")
def llm(tiny_llm) -> LLM:
    return tiny_llm(CASE)


def answers(
    llm: LLM, scheduler_config: SchedulerConfig, prompts: list[list[int]], params: SamplingParams
) -> tuple[EngineCore, list[EngineRequest]]:
    """What a core makes of prompts that are there at once; no page may be lost or left held."""
    core = EngineCore(llm._runner, scheduler_config)
    requests = [core.submit(at, ids, params, ends=())[0] for at, ids in enumerate(prompts)]
    while core.busy:
        core.step()
        core.scheduler.pools[0].check()
    assert core.scheduler.pools[0].num_in_use == 0
    assert all(request.finish_reason == "length" for request in requests)
    return core, requests


def logprobs(core: EngineCore, request: EngineRequest) -> list[float]:
    return [event.logprob for owner, event in core.events if owner is request]


def test_long_answers_run_in_a_pool_smaller_than_their_context(llm):
    """Each token's log-probability is that of attention without pages over everything before it."""
    core, requests = answers(llm, SCHEDULER_CONFIG, PROMPTS, SamplingParams(max_tokens=60, ignore_eos=True))
    assert max(len(request.sequence.tokens) for request in requests) == 80 > SCHEDULER_CONFIG.pool_tokens
    for request, scored in zip(requests, llm.score([r.sequence.tokens for r in requests]), strict=True):
        np.testing.assert_allclose(scored[request.num_prompt - 1 :], logprobs(core, request), atol=2e-4)


def test_the_tokens_are_those_of_pages_that_are_all_kept(llm):
    params = SamplingParams(max_tokens=28, temperature=1.0, seed=3, ignore_eos=True)
    kept = [answers(llm, replace(SCHEDULER_CONFIG, window=0), [ids], params)[1][0].token_ids for ids in PROMPTS]
    _, requests = answers(llm, SCHEDULER_CONFIG, PROMPTS, params)
    assert [request.token_ids for request in requests] == kept


def test_a_penalty_counts_tokens_behind_the_window(llm):
    params = SamplingParams(max_tokens=28, repetition_penalty=1.7, presence_penalty=0.9, ignore_eos=True)
    plain = SamplingParams(max_tokens=28, ignore_eos=True)
    assert params.reads_history
    kept = [answers(llm, replace(SCHEDULER_CONFIG, window=0), [ids], params)[1][0].token_ids for ids in PROMPTS[:2]]
    core = EngineCore(llm._runner, SCHEDULER_CONFIG)
    requests = [core.submit(at, ids, params, ends=())[0] for at, ids in enumerate(PROMPTS[:2])]
    other = core.submit(2, PROMPTS[2], plain, ends=())[0]
    while core.busy:
        core.step()
    assert [request.token_ids for request in requests] == kept
    assert other.token_ids == answers(llm, SCHEDULER_CONFIG, PROMPTS[2:], plain)[1][0].token_ids


def test_the_end_of_an_earlier_answer_is_found_though_its_beginning_is_gone(llm):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    core, (first,) = answers(llm, SCHEDULER_CONFIG, PROMPTS[:1], params)
    core.submit(1, PROMPTS[2], params, ends=())  # 8 pages: the 6 that are blank, and 2 of the first request's 9
    while core.busy:
        core.step()
    prompt = first.sequence.tokens[:38]
    assert core.scheduler.num_evicted == 2
    assert core.scheduler.pools[0].match_prefix(prompt, limit=37, whole=True).num_pages == 0
    (again,) = core.submit(2, prompt, params, ends=())
    while core.busy:
        core.step()
    assert core.scheduler.num_cached_tokens == 36
    (scored,) = llm.score([again.sequence.tokens])
    np.testing.assert_allclose(scored[len(prompt) - 1 :], logprobs(core, again), atol=2e-4)


def test_generate_asks_for_no_more_pages_than_windows_need(changed_dir):
    llm = LLM.load(changed_dir(CASE, max_position_embeddings=1024), mesh=mesh_of(ONE_DEVICE), dtype="float32")
    prompts, long = [[1, 2, 3]] * 2, SamplingParams(max_tokens=400, ignore_eos=True)
    rows = llm._runner.padded_num_seqs(2)
    tokens, _ = llm._pool_for(prompts, long)
    assert tokens == rows * 16 * ((8 + 128 + 14) // 16 + 1)
    tokens, _ = llm._pool_for(prompts, replace(long, repetition_penalty=1.1))  # which reads all tokens before
    assert tokens >= rows * 403


def test_a_longer_prompt_before_leaves_room_for_what_had_room(changed_dir):
    """Larger chunks of prompts need more pages at once, and an LLM keeps the larger of what it was asked for."""
    llm = LLM.load(changed_dir("mistral_window", max_position_embeddings=4096), mesh=mesh_of("data=1"), dtype="float32")
    asked = [([1] * 100, SamplingParams(max_tokens=3000))]
    for before in ([], [([1] * 2000, SamplingParams(max_tokens=10))]):
        for others in (asked, before, asked):
            if others:
                llm._core = SimpleNamespace(scheduler_config=llm._scheduler_config_for(others), warmed_up=False)
        scheduler_config = llm._scheduler_config_for(asked)
        StepScheduler(scheduler_config).check(100, 3100)
        assert scheduler_config.max_pages(scheduler_config.context) <= scheduler_config.num_pages < 300
        assert scheduler_config == llm._core.scheduler_config
    assert scheduler_config.chunk_tokens == 2048

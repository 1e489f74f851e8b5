"""Requests with a token bitmask: only allowed tokens, and neighbors that notice nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxmoe import SamplingParams, StepError
from jaxmoe.engine.core import EngineCore, EngineRequest
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import RequestFinished

from ..conftest import ONE_DEVICE, XLA
from ..ops.test_linear import compiler_found

CASE = "qwen3_moe_norm"
MESH = "data=2,tensor=2,expert=2"
PROMPT = [1, 5, 9, 2, 6, 5, 3]
NEIGHBORS = [[3, 1, 4], [5, 8], [9, 7, 9, 3, 2]]
ALTERNATING = ({7, 31, 32, 90}, {0, 4, 63, 64})  # around the ends of words
NUM_TOKENS = 9


@pytest.fixture(
    params=[(ONE_DEVICE, "xla"), (ONE_DEVICE, "native"), (MESH, "xla"), (MESH, "native")],
    ids=lambda param: "-".join(param),
)
def llm(request, tiny_llm):
    mesh, sampling = request.param
    if sampling == "native" and not compiler_found():
        pytest.skip("native sampling needs a C++ compiler")
    return tiny_llm(CASE, mesh, replace(XLA, sampling=sampling))


def bitmask_of(tokens: set[int], vocab_size: int) -> np.ndarray:
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def engine_core(llm, *, decode_steps: int = 3) -> EngineCore:
    config = SchedulerConfig(
        num_ranks=llm._runner.num_ranks, max_num_seqs=4, chunk_tokens=16, block_tokens=4, num_pages=24, page_size=4,
        context=32, decode_steps=decode_steps,
    )  # fmt: skip
    return EngineCore(llm._runner, config)


def run(core: EngineCore) -> None:
    while core.busy:
        core.step()
    core.free()


def allowed_at(tokens) -> set[int]:
    return ALTERNATING[(len(tokens) - len(PROMPT)) % 2]


def expected_tokens(llm) -> list[int]:
    """Greedy among the allowed tokens, from the model's own logits."""
    known = list(PROMPT)
    for _ in range(NUM_TOKENS):
        logits = llm.last_logits([known])[0]
        known.append(max(sorted(allowed_at(known)), key=lambda token: logits[token]))
    return known[len(PROMPT) :]


def submit(core: EngineCore, prompt, params: SamplingParams, token_bitmask=None) -> EngineRequest:
    return core.submit(0, list(prompt), params, ends=(), token_bitmask=token_bitmask)[0]


def test_a_masked_request_is_greedy_among_its_tokens_beside_others_that_give_what_they_give_alone(llm):
    vocab, core = llm.config.vocab_size, engine_core(llm)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    neighbor_params = [greedy, replace(greedy, temperature=0.9, seed=5), replace(greedy, presence_penalty=1.5)]
    masked = submit(core, PROMPT, greedy, lambda tokens: bitmask_of(allowed_at(tokens), vocab))
    others = [submit(core, *pair) for pair in zip(NEIGHBORS, neighbor_params, strict=True)]
    run(core)
    assert masked.token_ids == expected_tokens(llm)
    assert [masked.finish_reason, *(other.finish_reason for other in others)] == ["length"] * 4
    for prompt, params, other in zip(NEIGHBORS, neighbor_params, others, strict=True):
        assert other.token_ids == llm.generate([prompt], params)[0].token_ids
    text = [*PROMPT, *masked.token_ids]
    logprobs = [event.logprob for request, event in core.events if request is masked]
    np.testing.assert_allclose(logprobs, llm.score([text])[0][len(PROMPT) - 1 :], atol=1e-4)


def test_a_bitmask_is_asked_for_after_every_token_and_none_of_it_allows_all(llm):
    core, seen = engine_core(llm), []
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)

    def token_bitmask(tokens):
        seen.append(list(tokens))
        return bitmask_of({11}, llm.config.vocab_size) if len(seen) == 3 else None

    request = submit(core, PROMPT, params, token_bitmask)
    run(core)
    text = [*PROMPT, *request.token_ids]
    assert seen == [text[: len(PROMPT) + number] for number in range(NUM_TOKENS)]
    assert request.token_ids[2] == 11
    assert request.token_ids[:2] == llm.generate([PROMPT], replace(params, max_tokens=2))[0].token_ids
    rest = llm.generate([text[: len(PROMPT) + 3]], replace(params, max_tokens=NUM_TOKENS - 3))[0].token_ids
    assert request.token_ids[3:] == rest


def test_drawn_tokens_are_allowed_and_masks_compile_nothing(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE, XLA)
    core, vocab = engine_core(llm), llm.config.vocab_size
    params = SamplingParams(max_tokens=12, temperature=2.0, seed=3, ignore_eos=True)
    submit(core, PROMPT, params)
    while core.busy:
        core.step()
    assert core.buckets
    programs, step_fn = llm._runner.step_fn._cache_size(), llm._runner.step_fn
    request = submit(core, PROMPT, params, lambda tokens: bitmask_of(ALTERNATING[0], vocab))
    run(core)
    assert step_fn._cache_size() == programs
    assert set(request.token_ids) <= ALTERNATING[0]
    assert len(set(request.token_ids)) > 1


def test_steps_without_a_bitmask_share_one_array_on_the_devices(tiny_llm, monkeypatch):
    llm = tiny_llm(CASE, ONE_DEVICE, XLA)
    core, passed = engine_core(llm), []
    step_fn = llm._runner.step_fn

    def recorded(leaves, state, packed, token_bitmask, *rest, **static):
        passed.append((static["bucket"].seq_slots, token_bitmask))
        return step_fn(leaves, state, packed, token_bitmask, *rest, **static)

    monkeypatch.setattr(llm._runner, "step_fn", recorded)
    submit(core, PROMPT, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    run(core)
    assert len(passed) >= 4
    assert len({id(array) for _, array in passed}) == len({slots for slots, _ in passed})
    assert all((np.asarray(array) == -1).all() for _, array in passed)


def test_a_bitmask_that_allows_nothing_ends_its_request_alone(llm):
    vocab, core = llm.config.vocab_size, engine_core(llm)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    stuck = submit(core, PROMPT, greedy, lambda tokens: bitmask_of({7} if len(tokens) < 9 else set(), vocab))
    other = submit(core, NEIGHBORS[0], greedy)
    run(core)
    *events, last = [event for request, event in core.events if request is stuck]
    assert [event.token_id for event in events] == [7, 7]
    assert isinstance(last, RequestFinished)
    assert isinstance(last.error, StepError)
    assert "the token bitmask of prompt 0 after 9 tokens allows no token" in str(last.error)
    assert other.token_ids == llm.generate([NEIGHBORS[0]], greedy)[0].token_ids

"""One engine core a loaded model: LLM.generate and an AsyncEngine share pages, prefix cache and steps."""

from __future__ import annotations

import asyncio
import threading

import pytest

from jaxmoe import LLM, AsyncEngine, ConfigError, RequestError, SamplingParams

SIZES = dict(max_num_seqs=4, context=48, page_size=4, chunk_tokens=16)
PROMPT = [(5 * i) % 97 + 1 for i in range(33)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tiny_llm):
    return tiny_llm("mixtral_six_experts", "data=1")


@pytest.fixture
def llm(loaded):
    """The model with no core yet; programs are compiled once for all tests here."""
    return LLM.from_runner(loaded._runner, tokenizer=loaded.tokenizer, eos=loaded.eos)


@pytest.fixture(scope="module")
def alone(loaded):
    """Tokens of a request by itself, on a core of LLM.generate's own."""
    apart = LLM.from_runner(loaded._runner, tokenizer=loaded.tokenizer, eos=loaded.eos)
    return lambda prompt: apart.generate([prompt], PARAMS)[0].token_ids


async def collect(engine: AsyncEngine, prompt: list[int]) -> list[int]:
    return [event.token_id async for event in engine.stream(prompt, PARAMS)]


def test_generate_and_an_engine_share_pages_and_prefix_cache(llm, alone):
    with AsyncEngine(llm, **SIZES) as engine:
        streamed = asyncio.run(collect(engine, PROMPT))
        before = engine.stats()
        (output,) = llm.generate([PROMPT], PARAMS)
        after = engine.stats()
        assert llm._core is engine._core
        assert output.token_ids == streamed == alone(PROMPT)
        assert after["cached_prompt_tokens"] - before["cached_prompt_tokens"] == 32
        assert after["steps"] > before["steps"]
        again = [PROMPT[0], *reversed(PROMPT[1:])]
        generated = llm.generate([again], PARAMS)[0].token_ids
        cached = engine.stats()["cached_prompt_tokens"]
        assert asyncio.run(collect(engine, again)) == generated == alone(again)
        assert engine.stats()["cached_prompt_tokens"] - cached == 32
        assert engine.stats()["pages_in_use"] == 0


def test_both_at_once_give_what_each_gives_alone(llm, alone):
    prompts = [[(3 * i + j) % 97 + 1 for j in range(5 + 2 * i)] for i in range(8)]
    generated: list[list[int]] = []
    with AsyncEngine(llm, **SIZES) as engine:
        thread = threading.Thread(
            target=lambda: generated.extend(out.token_ids for out in llm.generate(prompts[:4], PARAMS))
        )

        async def scene() -> list[list[int]]:
            thread.start()
            return await asyncio.gather(*(collect(engine, prompt) for prompt in prompts[4:]))

        streamed = asyncio.run(scene())
        thread.join()
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0
    assert [*generated, *streamed] == [alone(prompt) for prompt in prompts]


def test_a_closed_engine_leaves_its_core_and_the_next_one_takes_it_over(llm):
    with AsyncEngine(llm, **SIZES) as engine:
        asyncio.run(collect(engine, PROMPT))
    core = engine._core
    llm.generate([PROMPT], PARAMS)
    assert llm._core is core
    with AsyncEngine(llm, **SIZES, on_compile=lambda done, total: pytest.fail("compiled again")) as again:
        assert again._core is core
        before = again.stats()["cached_prompt_tokens"]
        asyncio.run(collect(again, PROMPT))
        assert again.stats()["cached_prompt_tokens"] - before == 32
    (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=31, ignore_eos=True))  # past its context
    assert len(output.token_ids) == 31
    assert llm._core is not core


def test_what_an_engine_cannot_hold_is_refused_and_nothing_is_left_behind(llm):
    with AsyncEngine(llm, **SIZES) as engine:
        with pytest.raises(RequestError, match="the context holds 48"):
            llm.generate([[1, 2], PROMPT + PROMPT[:20]], PARAMS)
        assert engine.stats()["waiting"] == engine.stats()["running"] == 0
        with pytest.raises(ConfigError, match="an AsyncEngine runs on this LLM already"):
            AsyncEngine(llm, **SIZES)
        assert len(asyncio.run(collect(engine, PROMPT))) == 6


def test_an_engine_does_not_start_while_generate_runs(llm):
    events = llm.stream([PROMPT], PARAMS)
    next(events)
    with pytest.raises(ConfigError, match="requests that run"):
        AsyncEngine(llm, **SIZES)
    assert len(list(events)) == 5
    AsyncEngine(llm, **SIZES).close()

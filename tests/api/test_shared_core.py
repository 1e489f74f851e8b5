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


def test_a_step_that_an_ended_answer_left_in_flight_does_not_count_as_a_request(llm, alone):
    """An answer ends at a stop token while the next step is on the devices already."""
    first = alone(PROMPT)[0]
    ending = SamplingParams(max_tokens=6, stop_token_ids=(first,))
    assert llm.generate([PROMPT], ending)[0].finish_reason == "stop"
    loads = llm.expert_loads([PROMPT], PARAMS)
    assert loads is not None
    llm.generate([PROMPT], ending)
    with AsyncEngine(llm, **SIZES) as engine:

        async def ended() -> list[int]:
            return [event.token_id async for event in engine.stream(PROMPT, ending)]

        assert asyncio.run(ended()) == [first]
        assert llm.generate([PROMPT], ending)[0].token_ids == [first]
    with AsyncEngine(llm, **SIZES) as engine:
        assert asyncio.run(collect(engine, PROMPT)) == alone(PROMPT)


def test_a_start_up_that_fails_leaves_no_core(llm, alone):
    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        AsyncEngine(llm, **SIZES, on_compile=stop)
    assert llm._core is None
    assert llm.generate([PROMPT], PARAMS)[0].token_ids == alone(PROMPT)
    AsyncEngine(llm, **SIZES).close()


def test_a_small_core_that_an_engine_left_does_not_slow_more_sequences_down(llm):
    AsyncEngine(llm, **SIZES | {"max_num_seqs": 1}).close()
    slots = llm._core.scheduler_config.max_num_seqs
    llm.generate([PROMPT] * slots, PARAMS)
    small = llm._core
    assert small.warmed_up
    llm.generate([PROMPT] * (slots + 1), PARAMS)
    assert llm._core is not small


def test_one_trace_at_a_time(llm, tmp_path):
    with llm.trace(tmp_path / "offline.json"), pytest.raises(ConfigError, match=r"LLM\.trace records this LLM already"):
        AsyncEngine(llm, **SIZES, trace=tmp_path / "engine.json")
    with AsyncEngine(llm, **SIZES, trace=tmp_path / "engine.json") as engine:
        with pytest.raises(RequestError, match="writes a trace already"), llm.trace(tmp_path / "offline.json"):
            pass
        asyncio.run(collect(engine, PROMPT))
    assert (tmp_path / "engine.json").stat().st_size > 100
    traced = llm._core
    with AsyncEngine(llm, **SIZES) as engine:  # whose programs count no experts
        assert engine._core is not traced


def test_an_engine_that_closes_or_dies_leaves_generate_running(llm, alone, monkeypatch):
    prompts = [[(3 * i + j) % 97 + 1 for j in range(5)] for i in range(2)]
    engine = AsyncEngine(llm, **SIZES)
    events = llm.stream(prompts, PARAMS)
    got = [next(events)]
    engine.close()
    got += list(events)
    tokens = [[event.token_id for event in got if event.index == index] for index in range(2)]
    assert tokens == [alone(prompt) for prompt in prompts]

    engine = AsyncEngine(llm, **SIZES)
    events = llm.stream(prompts, PARAMS)
    monkeypatch.setattr(engine._core.scheduler, "plan", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(events)
    engine.close()
    assert llm.generate(prompts, PARAMS)[0].token_ids == alone(prompts[0])


def test_options_of_loading_are_refused_where_they_would_change_something(llm):
    from jaxmoe import CacheConfig, EngineConfig

    AsyncEngine(llm, cache=CacheConfig(kv_cache_gib=1e-3), max_num_seqs=2, context=32).close()
    AsyncEngine(llm, EngineConfig(max_num_seqs=2, context=32)).close()
    with pytest.raises(ConfigError, match="kv_dtype: options of loading were given with an LLM"):
        AsyncEngine(llm, cache=CacheConfig(kv_dtype="int8"))


def test_a_stream_that_is_closed_inside_a_step_is_cancelled_after_it(llm, alone, monkeypatch):
    """As where the thread that runs a step collects garbage. Its request is in the plan of the step already."""
    abandoned = llm.stream([PROMPT], SamplingParams(max_tokens=20, ignore_eos=True))
    next(abandoned)
    core, (request,) = llm._core, llm._core.requests.values()
    plan, seen = core.scheduler._plan_chunks, []

    def close_and_plan():
        abandoned.close()
        seen.append(request.finish_reason)
        return plan()

    monkeypatch.setattr(core.scheduler, "_plan_chunks", close_and_plan)
    other = [PROMPT[0], *reversed(PROMPT[1:])]
    assert llm.generate([other], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids == alone(other)[:2]
    assert llm._core is core
    assert seen[0] is None
    assert request.finish_reason == "cancelled"
    assert core.scheduler.pools[0].num_in_use == 0

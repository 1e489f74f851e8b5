"""The engine under mixed loads: outputs as alone, faults that harm no neighbor, nothing compiled after start-up."""

from __future__ import annotations

import asyncio
import random

import jax
import pytest

from jaxmoe import LLM, AsyncEngine, RequestError, SamplingParams, StepError
from jaxmoe.errors import ConfigError
from jaxmoe.ops.native import find_compiler

CASE = "mixtral_window"
SAME_BITS = ("olmoe_full_norm", "tensor=2"), ("qwen2_moe_shared", "data=1"), ("llama_llama3", "data=1")
KV_CACHE_GIB = {"data=1": 7e-5, "data=2,tensor=2,expert=2": 2e-5}  # some 30 and 18 pages a rank


@pytest.fixture(scope="module", params=sorted(KV_CACHE_GIB))
def engine(request, tiny_llm):
    llm = tiny_llm(CASE, request.param)
    with AsyncEngine(
        llm, max_num_seqs=8, context=48, kv_cache_gib=KV_CACHE_GIB[request.param], page_size=4, chunk_tokens=16
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in SAME_BITS else pytest.mark.sweep)
        for name in ("olmoe_full_norm", "qwen3_moe_norm", "qwen2_moe_shared", "llama_llama3")
        for mesh in ("data=1", "tensor=2")
    ],
)
def test_every_kind_of_layer_gives_the_same_bits_beside_others(name, mesh, tiny_llm):
    """With native kernels, logprobs and all: one prompt alone, and among eight more in the same steps."""
    if find_compiler() is None:  # then no such promise is made
        return
    llm = tiny_llm(name, mesh)
    prompts = [[(7 * i + j) % llm.config.vocab_size for j in range(3 + 4 * i)] for i in range(9)]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    alone, among = llm.generate(prompts[:1], params)[0], llm.generate(prompts, params)[0]
    assert (alone.token_ids, alone.logprobs) == (among.token_ids, among.logprobs)


def apart(llm: LLM) -> LLM:
    """The same weights and programs with an engine core of their own, beside the engine of this module."""
    return LLM.from_runner(llm._runner, tokenizer=llm.tokenizer, eos=llm.eos)


async def collect(engine: AsyncEngine, prompt, params, after: float = 0.0, **options) -> list[int]:
    await asyncio.sleep(after)
    return [chunk.token_id async for chunk in engine.stream(prompt, params, **options)]


async def all_together(engine: AsyncEngine, requests) -> list[list[int]]:
    return await asyncio.gather(*(collect(engine, *request) for request in requests))


def twice_with_pages_that_come_back(llm, requests, **sizes) -> list[list[int]]:
    """What requests give an engine with little room, whose pages go to host memory: the same the second time."""
    with AsyncEngine(llm, host_cache_gib=1e-3, **sizes) as engine:
        engine._core.scheduler.enable_offload(True)  # whatever was measured
        found = [asyncio.run(all_together(engine, requests)) for _ in range(2)]
        stats = engine.stats()
    assert found[0] == found[1]
    assert stats["pages_in_use"] == 0
    assert stats["pages_swapped_in"] > 0
    return found[0]


def requests_of(count: int, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    shared = [rng.randrange(vocab) for _ in range(12)]
    made = []
    for index in range(count):
        own = [rng.randrange(vocab) for _ in range(rng.randrange(1, 20))]
        random_params = {"temperature": 0.9, "top_p": 0.9, "seed": index} if index % 3 == 0 else {}
        prompt = shared[: rng.randrange(13)] + own
        if index % 5 == 1:
            random_params |= {"repetition_penalty": 1.3, "logit_bias": {3: 1.0}, "top_logprobs": 2}
        made.append((prompt, SamplingParams(max_tokens=rng.randrange(1, 14), ignore_eos=True, **random_params)))
    return made


def test_no_neighbor_changes_an_output(engine):
    """Requests that come while others run give what each gives alone, drawn ones too."""
    requests = requests_of(24, engine.llm.config.vocab_size)

    async def together():
        rng = random.Random(1)
        return await asyncio.gather(*(collect(engine, *r, after=rng.random() / 5) for r in requests))

    found = asyncio.run(together())
    by_itself = apart(engine.llm)
    alone = [by_itself.generate([prompt], params)[0].token_ids for prompt, params in requests]
    assert found == alone
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["pages_in_use"]) == (0, 0, 0)
    assert stats["cached_prompt_tokens"] > 0


def test_pages_run_out_and_everyone_still_ends(engine):
    """More is asked for than the pool holds at once (penalties keep pages behind the window): some are computed again,
    none is lost."""
    before = engine.stats()["preemptions"]
    vocab = engine.llm.config.vocab_size
    params = SamplingParams(max_tokens=40, presence_penalty=0.1, ignore_eos=True)
    requests = [([i % vocab, 1, 2, 3], params) for i in range(16)]

    async def together():
        return await asyncio.gather(*(collect(engine, *r) for r in requests))

    found = asyncio.run(together())
    assert [len(tokens) for tokens in found] == [40] * 16
    assert engine.stats()["preemptions"] > before
    assert found[3] == apart(engine.llm).generate([requests[3][0]], requests[3][1])[0].token_ids


def test_nothing_is_compiled_after_start_up(engine):
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:

        async def together():
            for_all = requests_of(500 if engine.llm.mesh.size == 1 else 60, engine.llm.config.vocab_size)
            return await asyncio.gather(*(collect(engine, *r, after=i % 17 / 20) for i, r in enumerate(for_all)))

        assert len(asyncio.run(together())) >= 60
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_who_is_cancelled_or_late_frees_its_pages(engine):
    async def scene():
        stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True), request_id="mine")
        with pytest.raises(RequestError, match="request_id='mine' is in use"):
            engine.stream([1], request_id="mine")
        heard = 0
        with pytest.raises(StepError, match="mine was ended: cancelled"):  # noqa: PT012  # it is raised while listening
            async for _ in stream:
                heard += 1
                engine.cancel("mine")
        assert 0 < heard < 40
        with pytest.raises(StepError, match="deadline"):
            await collect(engine, [1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True), timeout_s=0.0)
        engine.cancel("nobody")
        async for _ in engine.stream([4], SamplingParams(max_tokens=40, ignore_eos=True)):
            break  # a listener that leaves ends its request
        await collect(engine, [5], SamplingParams(max_tokens=2, ignore_eos=True))

    asyncio.run(scene())
    assert engine.stats()["pages_in_use"] == 0


def test_a_step_that_throws_ends_its_requests_and_no_others(engine, monkeypatch):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    real, calls = engine.llm._runner.step, []

    def step(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return real(*arguments, **named)

    async def scene():
        with pytest.raises(StepError, match="injected"):
            await collect(engine, [1, 2, 3], params)
        return await collect(engine, [4, 5, 6], params)

    monkeypatch.setattr(engine.llm._runner, "step", step)
    found = asyncio.run(scene())
    monkeypatch.undo()
    assert found == apart(engine.llm).generate([[4, 5, 6]], params)[0].token_ids
    assert engine.stats()["pages_in_use"] == 0


def test_what_can_never_run_is_refused_at_once(engine):
    async def scene():
        for prompt, params, words in (
            ([], SamplingParams(), "is empty"),
            ([1] * 40, SamplingParams(max_tokens=1), None),
            ([1] * 49, SamplingParams(), "context holds 48"),
            ([10**6], SamplingParams(), "token id 1000000"),
            ([1], 3, "params must be SamplingParams"),
        ):
            if words is None:
                assert len(await collect(engine, prompt, params)) == 1
                continue
            with pytest.raises(RequestError, match=words):
                engine.stream(prompt, params)
        for options in (
            {"priority": "high"},
            {"priority": None},
            {"timeout_s": "5"},
            {"timeout_s": 10**400},
            {"request_id": [1]},
        ):
            with pytest.raises(RequestError, match=next(iter(options))):
                engine.stream([1], **options)

    asyncio.run(scene())
    with pytest.raises(RequestError, match="asynchronous"):
        engine.stream([1])


def test_a_name_may_be_used_again_at_once(engine):
    async def scene():
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        for _ in range(3):
            stream = engine.stream([1, 2], one, request_id="again")
            async for chunk in stream:
                if chunk.finish_reason:
                    break
            assert [chunk async for chunk in stream] == []  # heard to its end already

    asyncio.run(scene())


def test_a_stream_that_is_dropped_ends_its_request(engine):
    async def scene():
        for _ in range(12):
            engine.stream([1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
        await collect(engine, [3], SamplingParams(max_tokens=1, ignore_eos=True))

    before = engine.stats()["new_tokens"]
    asyncio.run(scene())
    assert engine.stats()["new_tokens"] - before < 12 * 40
    assert engine.stats()["pages_in_use"] == 0


def test_start_up_tells_how_many_programs_are_ready(tiny_llm, capsys, monkeypatch):
    llm, sizes = apart(tiny_llm(CASE, "data=1")), dict(max_num_seqs=2, context=48, page_size=4, chunk_tokens=16)
    progress = []
    with AsyncEngine(llm, **sizes, on_compile=lambda done, total: progress.append((done, total))):
        total = progress[0][1]
        assert progress == [(done, total) for done in range(total + 1)]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    with AsyncEngine(apart(llm), **sizes) as engine:
        stats, shown = engine.stats(), capsys.readouterr().err
    assert f"pages for {stats['pool_tokens']} tokens of {stats['bytes_per_token']} bytes" in " ".join(shown.split())


def test_closing_ends_every_stream(tiny_llm):
    engine = AsyncEngine(apart(tiny_llm(CASE, "data=1")), max_num_seqs=2, context=48, page_size=4, chunk_tokens=16)

    async def scene():
        listening = asyncio.create_task(collect(engine, [1], SamplingParams(max_tokens=40, ignore_eos=True)))
        await asyncio.sleep(0)  # collect sleeps once, too
        await asyncio.sleep(0)  # the stream has started, and 40 tokens take longer than this
        engine.close()
        with pytest.raises(StepError, match="ended: cancelled"):
            await listening
        with pytest.raises(RequestError, match="closed"):
            engine.stream([1])

    asyncio.run(scene())
    engine.close()


def test_a_thread_that_dies_tells_everyone(tiny_llm, monkeypatch):
    engine = AsyncEngine(apart(tiny_llm(CASE, "data=1")), max_num_seqs=2, context=48, page_size=4, chunk_tokens=16)
    monkeypatch.setattr(engine._core.scheduler, "plan", lambda: 1 / 0)

    async def scene():
        with pytest.raises(StepError, match="the engine stopped: division by zero"):
            await collect(engine, [1], SamplingParams())

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"context": 10**9}, "context=1000000000 must lie in"),
        ({"kv_cache_gib": 0.0}, "kv_cache_gib=0.0 does not hold one page"),
        ({"page_size": -1}, "page_size=-1"),
        ({"context": "48"}, "context='48'"),
        ({"kv_cache_gib": float("nan")}, "=nan"),
        ({"kv_cache_gib": float("inf")}, "=inf"),
        ({"dtype": "float32"}, "loaded already"),
    ],
)
def test_sizes_that_cannot_be_are_named(tiny_llm, sizes, words):
    with pytest.raises(ConfigError, match=words):
        AsyncEngine(tiny_llm(CASE), **sizes)

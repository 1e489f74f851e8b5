"""Text of the core's tokens: stop strings end a request between two steps, and later tokens of the step are dropped."""

from __future__ import annotations

import asyncio
import gc

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from jaxmoe import LLM, AsyncEngine, SamplingParams, StepError
from jaxmoe.api.output_processor import OutputProcessor, RequestState, request_output
from jaxmoe.engine.core import EngineCore
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.trace import EngineTrace
from jaxmoe.text.tokenizer import CheckpointTokenizer

from ..conftest import ONE_DEVICE

PROMPT = [1, 5, 9, 2, 6, 5, 3]
FREE = SamplingParams(max_tokens=20, ignore_eos=True, top_logprobs=2)
SIZES = SchedulerConfig(
    num_ranks=1, max_num_seqs=4, chunk_tokens=16, block_tokens=16, num_pages=40, page_size=4, context=64, decode_steps=8
)


@pytest.fixture(scope="module")
def llm(tiny_llm) -> LLM:
    """A model whose token i has the text " i"."""
    loaded = tiny_llm("qwen3_moe_norm", ONE_DEVICE)
    words = HFTokenizer(models.WordLevel({f"\u2581{i}": i for i in range(loaded.config.vocab_size)}, "\u25810"))
    words.decoder = decoders.Metaspace()
    tokenizer = CheckpointTokenizer(words, {}, None)
    return LLM.from_runner(loaded._runner, tokenizer=tokenizer, eos=frozenset())


@pytest.fixture(scope="module")
def free(llm) -> list[int]:
    return llm.generate([PROMPT], FREE)[0].token_ids


def started(llm: LLM, params: SamplingParams, **options) -> tuple[EngineCore, OutputProcessor, list[RequestState]]:
    core, processor = EngineCore(llm._runner, SIZES), OutputProcessor(llm.tokenizer)
    if trace := options.pop("trace", None):
        core.trace = trace
    return core, processor, [processor.add(r) for r in core.submit(0, PROMPT, params, **({"ends": ()} | options))]


def finished(llm: LLM, params: SamplingParams, **options):
    """The core, the states and the output of a request, run to its end."""
    core, processor, states = started(llm, params, **options)
    while core.busy:
        core.step()
        processor.process(core)
    assert core.scheduler.pools[0].num_in_use == 0
    return core, states, request_output(states)


def cut(tokens: list[int], stop: str, *, min_tokens: int = 0) -> tuple[list[int], str, str]:
    """What an answer is that would go on with these tokens."""
    text = ""
    for count, token in enumerate(tokens, 1):
        checked, text = len(text), f"{text} {token}"
        at = text.find(stop, max(0, checked - len(stop) + 1))
        if count > min_tokens and at >= 0:
            return tokens[:count], text[:at], "stop"
    return tokens, text, "length"


def test_tokens_after_a_stop_string_never_appear_and_the_pages_are_free_at_once(llm, free):
    """The stop string is whole at the first token of a step of eight."""
    stop = f" {free[1]}"
    assert stop not in f" {free[0]}"
    core, processor, (state,) = started(llm, SamplingParams(max_tokens=20, stop=stop), trace=EngineTrace({}))
    while len(core.events) < 8:
        processor.process(core)
        core.step()
    assert state.token_ids == free[:1]
    assert [event.token_id for _, event in core.events] == free[1:9]
    assert core.scheduler.pools[0].num_in_use > 0
    processor.process(core)
    assert (core.requests, core.scheduler.running, core.scheduler.pools[0].num_in_use) == ({}, [], 0)
    core.drain()  # the step in flight
    processor.process(core)
    assert [(event.token_id, event.finish_reason) for event in state.events] == [(free[0], None), (free[1], "stop")]
    assert "".join(event.text for event in state.events) == f" {free[0]}"
    output = request_output([state])
    assert (output.token_ids, output.text, output.finish_reason) == (free[:2], f" {free[0]}", "stop")
    assert output.prompt_token_ids == PROMPT
    assert state.request.token_ids == free[:2]
    assert (core.num_new_tokens, core.timing.num_decoded_tokens) == (2, 1)
    assert (state.request.record.num_tokens, state.request.record.finish_reason) == (2, "stop")


@pytest.mark.parametrize("min_tokens", [0, 6])
def test_a_stop_string_is_found_wherever_tokens_divide_it(llm, free, min_tokens):
    text = "".join(f" {token}" for token in free)
    stops = [text[at : at + 4] for at in range(0, len(text) - 4, 3)]
    for stop in [*stops, f"{text[-2:]}!"]:  # the last one begins in the last token, and never ends
        params = SamplingParams(max_tokens=20, stop=stop, min_tokens=min_tokens, top_logprobs=2)
        _, (state,), output = finished(llm, params)
        assert (output.token_ids, output.text, output.finish_reason) == cut(free, stop, min_tokens=min_tokens)
        assert "".join(event.text for event in state.events) == output.text
        assert [event.token_id for event in state.events] == output.token_ids
        assert [event.logprob for event in state.events] == output.logprobs
        assert [event.top_logprobs for event in state.events] == output.outputs[0].top_logprobs
        assert [event.finish_reason for event in state.events] == [None] * (len(state.events) - 1) + [
            output.finish_reason
        ]


def test_what_comes_first_ends_the_request(llm, free):
    """Tokens 1 to 8 come of one step: the core sees the end token of it, whatever its text says."""
    end = next(at for at in range(3, 9) if free[at] not in free[:at])
    shown = lambda count: "".join(f" {token}" for token in free[:count])  # noqa: E731
    for stop, expected in (
        (shown(2)[1:], (free[:2], " ", "stop")),  # earlier in the step
        (shown(end + 1)[1:], (free[: end + 1], shown(end), "stop")),  # an end token has no text, which is whole
        (shown(end + 2)[1:], (free[: end + 1], shown(end), "stop")),  # later in the step
    ):
        _, (state,), output = finished(llm, SamplingParams(max_tokens=20, stop=stop), ends=(free[end],))
        assert (output.token_ids, output.text, output.finish_reason) == expected
        assert state.request.finish_reason == "stop"


def test_a_stop_string_in_the_last_token_is_the_finish_reason(llm, free):
    stop = "".join(f" {token}" for token in free[:6])
    params = SamplingParams(max_tokens=6, stop=stop, ignore_eos=True)
    core, (state,), output = finished(llm, params, trace=EngineTrace({}))
    assert (output.token_ids, output.text, output.finish_reason) == (free[:6], "", "stop")
    assert (state.request.finish_reason, state.request.record.finish_reason) == ("stop", "stop")
    assert core.num_new_tokens == state.request.record.num_tokens == 6


def test_every_sample_has_a_text_of_its_own(llm):
    drawn = dict(max_tokens=12, temperature=1.0, seed=3, n=3, ignore_eos=True)
    tokens = [out.token_ids for out in finished(llm, SamplingParams(**drawn))[2].outputs]
    assert len({tuple(each) for each in tokens}) == 3
    stop = f" {tokens[1][4]}"
    outputs = finished(llm, SamplingParams(**drawn, stop=stop))[2].outputs
    assert [(out.token_ids, out.text, out.finish_reason) for out in outputs] == [cut(each, stop) for each in tokens]


def test_generate_beside_an_engine_ends_at_stop_strings_too(llm, free):
    """The engine's thread runs the steps of both, and finds the stop strings of both."""
    params = SamplingParams(max_tokens=20, stop=f" {free[2]}", ignore_eos=True)
    expected = cut(free, f" {free[2]}")
    with AsyncEngine(llm, max_num_seqs=2, context=64, page_size=4, chunk_tokens=16, decode_steps=8) as engine:

        async def streamed() -> list:
            return [event async for event in engine.stream(PROMPT, params)]

        events = asyncio.run(streamed())
        assert ([event.token_id for event in events], "".join(event.text for event in events)) == expected[:2]
        (output,) = llm.generate([PROMPT], params)
        assert (output.token_ids, output.text, output.finish_reason) == expected
        stats = engine.stats()
    assert (stats["new_tokens"], stats["pages_in_use"], stats["running"]) == (2 * len(expected[0]), 0, 0)


def test_an_error_of_the_tokenizer_ends_its_request_alone(llm, free, monkeypatch):
    core, processor, (bad,) = started(llm, FREE)
    (good,) = [processor.add(request) for request in core.submit(1, PROMPT, FREE, ends=())]
    monkeypatch.setattr(bad.stream, "push", lambda token: 1 / 0)
    while core.busy:
        core.step()
        processor.process(core)
    (event,) = bad.events
    assert isinstance(event.error, StepError)
    assert "the text of this request failed: division by zero" in str(event.error)
    assert (good.token_ids, good.finish_reason) == (free, "length")
    assert (core.requests, core.scheduler.pools[0].num_in_use) == ({}, 0)


def test_nothing_is_kept_of_a_request_that_ended_or_that_nobody_holds(llm):
    core, processor, states = started(llm, FREE)
    assert len(processor._states) == 1
    del states
    gc.collect()
    assert len(processor._states) == 0
    while core.busy:
        core.step()
        processor.process(core)
    assert not core.events
    core, processor, _states = started(llm, SamplingParams(max_tokens=2))
    while core.busy:
        core.step()
        processor.process(core)
    assert len(processor._states) == 0

"""What a trace says is what happened: every token of every request and of every expert rank, every collective."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise

import pytest

from jaxmoe import AsyncEngine, RequestError, SamplingParams, StepError

from ..conftest import ONE_DEVICE

CASE = "qwen3_moe_norm"
MESH = "data=2,tensor=2,expert=2"
PROMPTS = [[(i * step) % 40 for i in range(length)] for step, length in ((1, 40), (3, 5), (7, 70))]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(params=[ONE_DEVICE, MESH])
def llm(request, tiny_llm):
    return tiny_llm(CASE, request.param)


def written(path):
    chrome = json.loads(path.read_text())
    page = path.with_suffix(".html").read_text()
    data = json.loads(re.search(r"const data = (.*);\n", page)[1].replace("\\u003c", "<"))
    return chrome, data


def test_every_request_and_step_is_there(llm, tmp_path):
    path = tmp_path / "trace.json"
    plain = [out.token_ids for out in llm.generate(PROMPTS, PARAMS)]
    llm._core = None  # nothing is known of the prompts
    with llm.trace(path) as trace:
        assert [out.token_ids for out in llm.generate(PROMPTS, PARAMS)] == plain
    assert [(r.num_prompt, r.num_tokens, r.finish_reason) for r in trace.requests] == [
        (len(prompt), 6, "length") for prompt in PROMPTS
    ]
    for request, prompt in zip(trace.requests, PROMPTS, strict=True):
        assert request.cached + sum(chunk["count"] for chunk in request.chunks) == len(prompt)
        assert 0 <= request.chunks[-1]["step"] == request.first_token_step < request.last_token_step
    chrome, data = written(path)
    assert len(data["steps"]) == len(trace.steps) == trace.num_steps
    steps = [event for event in chrome["traceEvents"] if event["pid"] == 1 and event["ph"] == "X"]
    assert len(steps) == trace.num_steps
    for before, after in pairwise(steps):  # the devices run one step after another
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2
    names = {event["args"]["name"] for event in chrome["traceEvents"] if event.get("name") == "thread_name"}
    assert names == {f"prompt {i}" for i in range(3)}
    llm.generate([[1]], PARAMS)
    assert len(trace.requests) == 3  # nothing is recorded any more


def test_every_token_is_counted_at_its_experts(llm, tmp_path):
    llm._core = None
    with llm.trace(tmp_path / "trace.json") as trace:
        llm.generate(PROMPTS, PARAMS)
    moe, ranks = llm.config.moe, llm._runner.placement.num_shards("moe_expert")
    computed = sum(len(prompt) - request.cached for prompt, request in zip(PROMPTS, trace.requests, strict=True))
    computed += 3 * 5  # the last of six new tokens is not read any more
    for layer in range(sum(llm.config.moe_layers)):
        got = [step.expert_tokens[layer] for step in trace.steps]
        assert all(len(each) == ranks for each in got)
        assert sum(map(sum, got)) == computed * moe.num_experts_per_tok


def test_collectives_are_those_of_the_contract(tiny_llm, tmp_path):
    llm = tiny_llm(CASE, MESH)
    with llm.trace(tmp_path / "trace.json") as trace:
        llm.generate(PROMPTS, PARAMS)
    layers = llm.config.num_hidden_layers
    for step in trace.steps:
        tensor = [c for c in step.collectives if c["op"] == "all-reduce"]
        assert sum(c["count"] for c in tensor) == (2 * layers + 1) * step.decode_steps
        assert {c["bytes"] for c in tensor} == {step.bucket.num_tokens * llm.config.hidden_size * 4}


def test_an_engine_writes_its_trace_when_closed(tiny_llm, tmp_path):
    path = tmp_path / "engine.json"

    async def scene(engine):
        async def listen(prompt, name):
            return [chunk async for chunk in engine.stream(prompt, PARAMS, request_id=name)]

        await asyncio.gather(*(listen(prompt, f"</script>{i}") for i, prompt in enumerate(PROMPTS[:2])))
        engine.stream([5], SamplingParams(max_tokens=40, ignore_eos=True), request_id="late", timeout_s=0.0)

    llm = tiny_llm(CASE, ONE_DEVICE)
    with AsyncEngine(llm, max_num_seqs=4, context=64, page_size=4, chunk_tokens=16, trace=path) as engine:
        asyncio.run(scene(engine))
        assert not path.exists()
    chrome, data = written(path)
    assert not any(step["failed"] for step in data["steps"])
    assert [request["name"] for request in data["requests"]] == ["</script>0", "</script>1", "late"]
    assert path.with_suffix(".html").read_text().count("</script>") == 1
    ended = [event["name"] for event in chrome["traceEvents"] if event["name"].startswith("ended")]
    assert sorted(ended)[1:] == ["ended: length"] * 2


def test_a_trace_that_begins_late_harms_nobody(tiny_llm, tmp_path):
    llm = tiny_llm(CASE, ONE_DEVICE)
    expected = llm.generate([PROMPTS[0]], PARAMS)[0].token_ids
    early = llm.stream([PROMPTS[0]], PARAMS)
    heard = [next(early).token_id]
    with llm.trace(tmp_path / "trace.json") as trace:
        llm.generate([PROMPTS[1]], PARAMS)
    assert heard + [chunk.token_id for chunk in early] == expected
    assert [request.num_prompt for request in trace.requests] == [len(PROMPTS[1])]


def test_a_step_that_fails_is_marked(tiny_llm, tmp_path, monkeypatch):
    llm = tiny_llm(CASE, ONE_DEVICE)
    real, calls = llm._runner.step, []

    def step(*arguments, **named):
        calls.append(1)
        state, output = real(*arguments, **named)
        return state, output._replace(sampled=1 / 0 if len(calls) == 3 else output.sampled)

    monkeypatch.setattr(llm._runner, "step", step)
    with llm.trace(tmp_path / "trace.json") as trace, pytest.raises(StepError):
        llm.generate([PROMPTS[1]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert any(step.failed for step in trace.steps)


@pytest.mark.parametrize("name", [".", "page.html", "no/such/folder/trace.json"])
def test_a_path_that_cannot_be_is_refused_before_anything_runs(tiny_llm, tmp_path, name):
    llm = tiny_llm(CASE, ONE_DEVICE)
    with pytest.raises(RequestError, match="trace "), llm.trace(tmp_path / name):
        raise AssertionError
    with pytest.raises(RequestError, match="trace "):
        AsyncEngine(llm, trace=tmp_path / name)

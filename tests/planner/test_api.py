"""What is made of a compiler's answer: it fits or not, and every collective stands beside what was planned. Emulated
devices stand in for the target's, and given steps for compiled ones."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jax
import pytest

from jaxmoe import EngineConfig
from jaxmoe.aot import compile as aot
from jaxmoe.aot import fit
from jaxmoe.aot.compile import PHASES, CompiledStep
from jaxmoe.aot.targets import DEVICES
from jaxmoe.api import async_engine as engine
from jaxmoe.engine.batch import all_buckets
from jaxmoe.errors import ConfigError
from jaxmoe.parallel.collectives import CollectiveOp

from ..conftest import XLA

CASE = "qwen3_moe_sparse_step"
GIB = 2**30
LIMIT = DEVICES["v5p"].hbm_bytes
REDUCE, SHUFFLE, GATHER = (
    CollectiveOp(op=op, axes=axes, result_bytes=64)
    for op, axes in (("all-reduce", ("tensor",)), ("all-to-all", ("expert",)), ("all-gather", ("tensor",)))
)
PLAN = Counter({REDUCE: 4, SHUFFLE: 2})
NO_ROOM = {
    "old": "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 120.50G of 94.75G hbm. Exceeded hbm capacity by 25.75G.",
    "new": "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (120.50G) exceeds available HBM (94.75G). HLO module: jit__step.",
}


def step(temp_gib: int = 1, total_gib: int = 2, collectives: Counter[CollectiveOp] = PLAN) -> CompiledStep:
    return CompiledStep(
        temp_bytes=temp_gib * GIB, total_bytes=total_gib * GIB, collectives=collectives, planned=PLAN,
        scatter_padding=0.0, optimal_seconds=total_gib / 100, compile_seconds=1.5,
    )  # fmt: skip


@pytest.fixture
def answer(tiny_dir, monkeypatch):
    """(prefill, decode, changes of the question) -> the answer where a step compiles to this, fails so, or runs it."""

    def given(prefill: Any, decode: Any, **changes: Any) -> dict[str, Any]:
        steps = dict(zip(PHASES, (prefill, decode), strict=True))

        def compile_step(runner, phase, **sizes):
            given = steps[phase]
            if isinstance(given, Exception):
                raise given
            return given if isinstance(given, CompiledStep) else given(runner, phase, **sizes)

        monkeypatch.setattr(fit, "topology_devices", lambda target: jax.devices()[: target.num_devices])
        monkeypatch.setattr(fit, "compile_step", compile_step)
        asked = dict(target="v5p:2x2x1", mesh="expert=2,tensor=2", max_num_seqs=4, context=64) | changes
        question = fit.CompileRequest.of(model=str(tiny_dir(CASE)), **asked)
        said: list[Any] = []
        result = fit._compile_steps(question, said.append)
        assert [one["phase"] for one in said] == list(result["phases"])
        return result

    return given


def test_what_fits(answer):
    found = answer(step(temp_gib=3, total_gib=4), step(temp_gib=1, total_gib=2))
    assert (found["fits"], found["as_planned"]) == (True, True)
    assert (found["bytes"]["temp"], found["bytes"]["total"], found["bytes"]["limit"]) == (3 * GIB, 4 * GIB, LIMIT)
    assert (found["optimal_seconds"], found["compile_seconds"]) == (0.02, 3.0)
    assert {one["phase"] for one in found["collectives"]} == set(PHASES)
    assert all(one["count"] == one["planned"] > 0 for one in found["collectives"])


def test_what_compiles_and_is_too_big(answer):
    found = answer(step(), step(total_gib=96))
    assert (found["fits"], found["as_planned"]) == (False, True)
    assert found["bytes"]["total"] == 96 * GIB
    assert [part["fits"] for part in found["phases"].values()] == [True, False]


def test_what_is_too_big_without_any_program(answer, monkeypatch):
    monkeypatch.setattr(fit, "held_bytes", lambda runner, **sizes: (LIMIT, 1))
    found = answer(AssertionError(), AssertionError())
    assert (found["fits"], found["as_planned"], found["phases"]) == (False, None, {})
    assert found["bytes"] == {"weights": LIMIT, "kv": 1, "temp": None, "total": None, "limit": LIMIT}


@pytest.mark.parametrize("message", NO_ROOM.values(), ids=NO_ROOM)
@pytest.mark.parametrize("phase", PHASES)
def test_a_compiler_without_room_says_how_much_it_needs(phase, message, answer):
    failed = RuntimeError(message)
    found = answer(failed, step()) if phase == "prefill" else answer(step(temp_gib=3), failed)
    size, needed = found["bytes"], int(120.5 * GIB)
    assert not found["fits"]
    assert size["total"] == needed
    assert size["limit"] == int(94.75 * GIB)
    assert size["temp"] == needed - size["weights"] - size["kv"]
    assert found["phases"][phase]["error"] == message
    assert found["optimal_seconds"] is None
    if phase == "decode":  # what was compiled before is kept
        assert found["phases"]["prefill"]["temp_bytes"] == 3 * GIB
        assert {one["phase"] for one in found["collectives"]} == {"prefill"}
    assert found["as_planned"] is None


@pytest.mark.parametrize(
    "words", ["Out of memory", "memory space smem. Used 1.50M of 1.00M smem.", "Used 1.0K of 0.5K hbm"]
)
def test_a_compiler_without_room_that_does_not_say_how_much_it_needs(words, answer):
    found = answer(step(temp_gib=3), RuntimeError(f"RESOURCE_EXHAUSTED: {words}"))
    assert not found["fits"]
    assert (found["bytes"]["total"], found["bytes"]["temp"], found["bytes"]["limit"]) == (None, 3 * GIB, LIMIT)
    assert found["phases"]["prefill"]["total_bytes"] == 2 * GIB
    assert found["phases"]["decode"]["total_bytes"] is None


def test_a_compiler_that_fails_otherwise_is_not_taken_for_one_without_room(answer):
    with pytest.raises(RuntimeError, match="INTERNAL"):
        answer(step(), RuntimeError("INTERNAL: fault"))


@pytest.mark.parametrize(
    ("found", "differs"),
    [
        (PLAN + Counter({GATHER: 1}), ("all-gather", 1, 0)),
        (Counter({SHUFFLE: 2}), ("all-reduce", 0, 4)),
        (PLAN + Counter({SHUFFLE: 1}), ("all-to-all", 3, 2)),
    ],
    ids=["unplanned", "missing", "another number"],
)
def test_what_is_not_as_planned_is_listed(found, differs, answer):
    combined = answer(step(), step(collectives=found))
    assert (combined["fits"], combined["as_planned"]) == (True, False)
    assert [part["as_planned"] for part in combined["phases"].values()] == [True, False]
    listed = [one for one in combined["collectives"] if one["count"] != one["planned"]]
    assert [(one["phase"], one["op"], one["count"], one["planned"]) for one in listed] == [("decode", *differs)]


class _LoweredError(Exception):
    pass


@pytest.mark.parametrize(("target", "grouped"), [("v5p:2x2x1", "blocks"), ("h200:1x4", "blocks")])
def test_steps_are_those_of_an_engine(target, grouped, answer, monkeypatch, tiny_llm):
    """Its largest buckets, its decode steps, and the kernels it would choose there."""
    lowered: list[Any] = []

    def lower(runner, state, bucket, *, max_decode_steps):
        lowered.append((bucket, max_decode_steps, runner.kernels.grouped))
        raise _LoweredError

    def compile_step(runner, phase, **sizes):
        with pytest.raises(_LoweredError):
            aot.compile_step(runner, phase, **sizes)
        return step()

    monkeypatch.setattr(aot.ModelRunner, "lower", lower)
    answer(compile_step, compile_step, target=target, max_num_seqs=9, context=100)

    llm = tiny_llm(CASE, "expert=2,tensor=2", XLA)
    options = EngineConfig().with_options({"max_num_seqs": 9, "context": 100, "kv_cache_gib": 1.0})
    scheduler_config = engine._scheduler_config(llm, options)
    buckets = all_buckets(
        scheduler_config, min_seq_slots=llm._runner.min_seq_slots, pages=-(-100 // scheduler_config.page_size)
    )
    decode = [bucket for bucket in buckets if not bucket.blocks][-1]
    assert lowered == [(buckets[-1], 1, grouped), (decode, scheduler_config.decode_steps, grouped)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("target v5p:2x2x1 cannot be compiled for here", "target v5p:2x2x1 cannot be compiled for here"),
        ("INTERNAL: fault", "target v5p:2x2x1: INTERNAL: fault"),
    ],
)
def test_an_error_names_the_target_once(said, message, tiny_dir, tmp_path, monkeypatch):
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\nhead -n 1 > {tmp_path}/question\necho '{json.dumps({'error': said})}'\n")
    child.chmod(0o755)
    monkeypatch.setattr(fit.sys, "executable", str(child))
    asked = fit.CompileRequest.of(
        model=str(tiny_dir(CASE)), target="v5p:2x2x1", mesh="tensor=4", max_num_seqs=4, context=64
    )
    with pytest.raises(ConfigError) as caught:
        fit.compile_for(asked)
    assert str(caught.value) == message

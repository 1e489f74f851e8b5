"""jaxmoe compile for people and as JSON, and its exit code, for whatever a compiler may have answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxmoe.aot import fit
from jaxmoe.config.engine import CHUNK_TOKENS

from .commands import Outcome, jaxmoe

GIB = 2**30
COMMAND = ["compile", "demo", "--target", "v5p:2x2x1", "--mesh", "tensor=4"]


def row(phase: str, op: str, count: int, planned: int) -> dict[str, Any]:
    return {"phase": phase, "op": op, "axes": ["tensor"], "count": count, "bytes": 2048, "planned": planned}


def part(**changes: Any) -> dict[str, Any]:
    return {"fits": True, "as_planned": True, "temp_bytes": GIB, "total_bytes": 41 * GIB} | changes


def answer(**changes: Any) -> dict[str, Any]:
    """What compile_for gives; `bytes` are changed one by one."""
    size = {"weights": 30 * GIB, "kv": 10 * GIB, "temp": GIB, "total": 41 * GIB, "limit": 95 * GIB}
    plain = {
        "target": "v5p:2x2x1", "fits": True, "as_planned": True, "compile_seconds": 3.2, "behind_windows": None,
        "collectives": [row("prefill", "all-reduce", 4, 4), row("decode", "all-reduce", 4, 4)],
        "phases": {"prefill": part(), "decode": part()},
    }  # fmt: skip
    return plain | changes | {"bytes": size | changes.get("bytes", {})}


def test_pages_that_are_kept_behind_windows_are_said(run_compile):
    found = {
        "tokens": 4096, "layers": 12, "of_layers": 24, "freed": False, "held_tokens": 4096, "kept_bytes": 3 * 2**20
    }  # fmt: skip
    said = run_compile(answer(behind_windows=found)).out
    assert (
        "Pages outside attention windows of 12 of 24 layers are not freed: 3.0 MiB for a request of 4,096 tokens."
    ) in said


@pytest.fixture
def run_compile(capsys, monkeypatch):
    """(answer, options) -> what the command does with it."""

    def run(given: dict[str, Any], *options: object) -> Outcome:
        monkeypatch.setattr(fit, "compile_for", lambda question, on_phase: given)
        return jaxmoe(capsys, *COMMAND, *options)

    return run


def last_line(outcome: Outcome) -> str:
    return outcome.out.splitlines()[-1]


def test_what_fits_and_is_as_planned(run_compile):
    outcome = run_compile(answer())
    assert outcome.code == 0
    assert last_line(outcome) == "fits; compiled in 3 s"
    assert all(size in outcome.out for size in ("30.00", "10.00", "1.00", "41.00", "95.00", "2,048"))
    assert "DIFFERS" not in outcome.out
    assert "planned:" not in outcome.out
    assert "pads" not in outcome.out


def test_what_the_compiler_pads_is_said(run_compile):
    outcome = run_compile(answer(phases={"prefill": part(scatter_padding=0.0088), "decode": part(scatter_padding=0.0)}))
    assert outcome.code == 0
    assert [line for line in outcome.out.splitlines() if "pads" in line] == [
        "prefill: the compiler pads reduce-scatters by 0.9% of their bytes"
    ]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_step_that_is_not_as_planned_is_said_marked_and_an_error(count, run_compile):
    given = answer(
        as_planned=False,
        phases={"prefill": part(), "decode": part(as_planned=False)},
        collectives=[*answer()["collectives"], row("decode", "all-gather", count, 4)],
    )
    outcome = run_compile(given)
    assert outcome.code == 1
    assert "decode is not as planned: 1 of 2 collectives differ" in outcome.out
    assert "prefill is not" not in outcome.out
    (marked,) = [line for line in outcome.out.splitlines() if "DIFFERS" in line]
    assert "all-gather" in marked
    assert last_line(outcome) == "fits; compiled in 3 s"
    assert run_compile(given, "--json").code == 1


def test_a_shortage_that_is_known_is_said_in_numbers(run_compile):
    size = {"temp": 81 * GIB, "total": 121 * GIB, "limit": 94.5 * GIB}
    failed = part(fits=False, as_planned=None, error="RESOURCE_EXHAUSTED: Used 121.00G of 94.50G hbm.")
    outcome = run_compile(answer(fits=False, bytes=size, phases={"prefill": part(), "decode": failed}))
    assert outcome.code == 1
    assert "decode: RESOURCE_EXHAUSTED" in outcome.out
    assert last_line(outcome).startswith(
        "does not fit: a device needs 121.00 GiB and has 94.50; about 1.3 times the devices, a smaller --max-num-seqs"
    )


def test_a_shortage_that_is_not_known_is_said_without_a_ratio(run_compile):
    failed = part(fits=False, as_planned=None, temp_bytes=None, total_bytes=None, error="RESOURCE_EXHAUSTED: smem")
    outcome = run_compile(
        answer(fits=False, bytes={"total": None}, phases={"prefill": part(), "decode": failed}, as_planned=None)
    )
    assert outcome.code == 1
    assert last_line(outcome).startswith(
        "does not fit: weights and pages take 40.00 of the 95.00 GiB of a device, and the compiler found no room for "
        "the rest; more devices, a smaller --max-num-seqs"
    )
    assert "times" not in outcome.out


def test_weights_and_pages_that_alone_are_too_much(run_compile):
    size = {"temp": None, "total": None, "limit": 19.5 * GIB}
    outcome = run_compile(answer(fits=False, as_planned=None, bytes=size, phases={}, collectives=[]))
    assert outcome.code == 1
    assert last_line(outcome).startswith(
        "does not fit: weights and pages take 40.00 of the 19.50 GiB of a device; more than 2.1 times the devices, "
    )


@pytest.mark.parametrize("given", [answer(), answer(fits=False), answer(as_planned=False)])
def test_json_is_the_answer_and_nothing_else(given, run_compile):
    outcome = run_compile(given, "--json")
    assert json.loads(outcome.out) == given
    assert outcome.out.count("\n") == 1
    assert outcome.code == (0 if given["fits"] and given["as_planned"] else 1)


def test_the_question_is_what_was_asked(capsys, monkeypatch):
    asked: list[fit.CompileRequest] = []
    monkeypatch.setattr(fit, "compile_for", lambda question, on_phase: asked.append(question) or answer())
    jaxmoe(capsys, *COMMAND)
    options = [
        "--max-num-seqs",
        8,
        "--context",
        256,
        "--chunk-tokens",
        64,
        "--kv-dtype",
        "fp8",
        "--dispatch",
        "all_gather",
    ]
    jaxmoe(capsys, *COMMAND, *options)
    plain = {"model": "demo", "target": "v5p:2x2x1", "mesh": "tensor=4"}
    assert asked == [
        fit.CompileRequest.of(**plain, max_num_seqs=64, context=4096, chunk_tokens=CHUNK_TOKENS),
        fit.CompileRequest.of(
            **plain, max_num_seqs=8, context=256, chunk_tokens=64, kv_dtype="fp8", kernels={"dispatch": "all_gather"}
        ),
    ]


def test_its_help_says_when_it_exits_1(capsys):
    assert "Exit with 1 if out of memory" in " ".join(jaxmoe(capsys, "compile", "--help").out.split())

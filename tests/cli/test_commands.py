"""Commands on tiny models: what stands on standard output, and the exit code. compile is in test_compile.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe import LLM, ConfigError, SamplingParams
from jaxmoe.model.kernels import NATIVE_OPS, KernelConfig
from jaxmoe.report import verify
from jaxmoe.weights import load

from ..conftest import ONE_DEVICE
from .commands import Outcome, jaxmoe

CASE = "mixtral_window"
MESH = "data=2,tensor=2,expert=2"
TWO_MESHES = [
    {"data": 2, "pipeline": 1, "tensor": 2, "expert": 2}, {"data": 1, "pipeline": 1, "tensor": 4, "expert": 2},
]  # fmt: skip


@pytest.fixture
def ids(tmp_path) -> Path:
    """Two prompts, with an empty line between."""
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3, 4]\n\n[5, 6]\n")
    return tmp_path / "ids.jsonl"


def _objects(outcome: Outcome) -> list[dict]:
    """Standard output as JSON objects, one a line and nothing else."""
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_generate_prints_one_object_a_request(capsys, tiny_dir, ids):
    options = ["--mesh", MESH, "--dtype", "float32", "--max-tokens", 3, "--ignore-eos", "--json"]
    outcome = jaxmoe(capsys, "generate", tiny_dir(CASE), "--prompt-ids", ids, *options)
    assert outcome.code == 0
    first, second = _objects(outcome)
    for index, (found, num_prompt_tokens) in enumerate(((first, 4), (second, 2))):
        assert found["index"] == index
        assert found["num_prompt_tokens"] == num_prompt_tokens
        assert len(found["token_ids"]) == len(found["logprobs"]) == 3
        assert max(found["logprobs"]) <= 0
        assert (found["text"], found["finish_reason"]) == ("", "length")
        assert 0 <= found["seed"] < 2**53


def test_generate_for_people_prints_each_request(capsys, tiny_dir, tiny_llm, ids):
    options = ["--mesh", MESH, "--dtype", "float32", "--max-tokens", 3, "--ignore-eos"]
    outcome = jaxmoe(capsys, "generate", tiny_dir(CASE), "--prompt-ids", ids, *options)
    assert outcome.code == 0
    assert [line[:4] for line in outcome.out.splitlines()] == ["[0] ", "[1] "]
    assert "data=2 x tensor=2 x expert=2 on 8 cpu devices" in outcome.err
    rates = r"6 prompt tokens at [\d.]+ tokens/s, 6 new tokens at [\d.]+ tokens/s; compiling took [\d.]+ s"
    assert re.search(rates, outcome.err.splitlines()[-1])
    runner = tiny_llm(CASE, MESH)._runner
    pool, num_bytes = 4 * runner.min_seq_slots * 16, runner.bytes_per_token  # ranks, rows of each, a page for each
    said = f"pages for {pool} tokens of {num_bytes} bytes ({pool * num_bytes / 2**20:.1f} MiB)"
    assert said in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--no-native", "--layers", "unroll"], marks=pytest.mark.sweep),
        ["--layers", "scan", "--pointwise", "xla", "--sampling", "xla"],
    ],
)
def test_kernels_that_were_chosen_give_the_same_tokens(options, capsys, tiny_dir, tiny_llm, ids):
    command = ["generate", tiny_dir(CASE), "--prompt-ids", ids, "--mesh", MESH, "--dtype", "float32"]
    outcome = jaxmoe(capsys, *command, "--max-tokens", 3, "--ignore-eos", "--json", *options)
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    expected = tiny_llm(CASE, ONE_DEVICE).generate([[1, 2, 3, 4], [5, 6]], greedy)
    assert [found["token_ids"] for found in _objects(outcome)] == [output.token_ids for output in expected]


PLAIN = {step: getattr(KernelConfig(), step) for step in NATIVE_OPS}


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ([], {}),
        (["--layers", "unroll"], {"layers": "unroll"}),
        (["--pointwise", "xla"], {"pointwise": "xla"}),
        (["--sampling", "native"], {"sampling": "native"}),
        (["--no-native"], PLAIN),
        (["--no-native", "--layers", "scan"], PLAIN | {"layers": "scan"}),
        (["--no-native", "--sampling", "native"], PLAIN | {"sampling": "native"}),
        (["--native", "--layers", "unroll"], dict.fromkeys(NATIVE_OPS, "native") | {"layers": "unroll"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_options_choose_is_all_that_is_chosen(options, kernels, capsys, tiny_dir, ids, monkeypatch):
    def load(_, model, config, **options):
        assert config.kernels == kernels
        raise ConfigError("asked")

    monkeypatch.setattr(LLM, "__init__", load)
    assert "asked" in jaxmoe(capsys, "generate", tiny_dir(CASE), "--prompt-ids", ids, *options).err


def test_score_prints_one_object_a_sequence_and_its_total(capsys, tiny_dir, tiny_llm, ids):
    command = ["score", tiny_dir(CASE), "--ids", ids, "--mesh", MESH, "--dtype", "float32"]
    outcome = jaxmoe(capsys, *command, "--json")
    assert outcome.code == 0
    expected = tiny_llm(CASE, ONE_DEVICE).score([[1, 2, 3, 4], [5, 6]])
    for index, (found, logprobs) in enumerate(zip(_objects(outcome), expected, strict=True)):
        assert found["index"] == index
        np.testing.assert_allclose(found["logprobs"], logprobs, atol=2e-4)
        assert found["total"] == pytest.approx(sum(found["logprobs"]), abs=1e-5)
    assert jaxmoe(capsys, *command).out.startswith("[0] 4 tokens, total -")


def _verify(capsys, tiny_dir, *options: object) -> Outcome:
    return jaxmoe(capsys, "verify", tiny_dir(CASE), "--max-tokens", 4, *options)


def test_verify_passes_a_good_model_in_the_layouts_asked_for(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: TWO_MESHES[1:])
    asked = ["ep-tp", "cp-ep-tp", "dp-ep"]
    outcome = _verify(capsys, tiny_dir, "--json", *(word for name in asked for word in ("--layout", name)))
    assert outcome.code == 0
    found = _objects(outcome)
    others = ["ep-tp", "dp-ep"]  # without a data axis cp-ep-tp is ep-tp
    assert [check["mesh"] for check in found] == TWO_MESHES[1:] * len(others)
    assert [check["layout"] for check in found] == others
    assert {check["layout"]: check["also"] for check in found if check["also"]} == {"ep-tp": ["cp-ep-tp"]}
    assert all(check["passed"] for check in found)
    assert all(check["num_equal"] == check["num_tokens"] == 12 for check in found)
    assert all(0 <= check["max_logit_error"] <= 1e-4 for check in found)


def test_verify_runs_layouts_that_are_alike_on_a_mesh_once(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: [{"data": 2}])
    outcome = _verify(capsys, tiny_dir, "--layout", "tp", "--layout", "ep-tp", "--layout", "tp")
    assert outcome.code == 0
    assert "│ tp, ep-tp │" in outcome.out
    assert "1 of 1 placements match one device" in outcome.out


def test_verify_says_which_meshes_a_model_has_too_few_layers_for(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: [{"pipeline": 8}, {"data": 2}])
    refused, passed = _objects(_verify(capsys, tiny_dir, "--layout", "ep-tp", "--json"))
    assert "pipeline=8 needs at least 8 identical consecutive layers" in refused["refused"]
    assert (refused["passed"], passed["passed"]) == (False, True)
    outcome = _verify(capsys, tiny_dir, "--layout", "ep-tp")
    assert outcome.code == 0
    assert "1 of 1 placements match one device; 1 cannot hold this model" in outcome.out


def test_verify_exits_1_where_nothing_could_run(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: [{"pipeline": 8}, {"pipeline": 4, "data": 2}])
    outcome = _verify(capsys, tiny_dir, "--layout", "ep-tp")
    assert outcome.code == 1
    assert "nothing was compared; 2 cannot hold this model" in outcome.out


def _break_one_weight(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """On meshes of several devices with a tensor axis of 4, the final norm is off by a factor."""
    load_param = load.load_param

    def off(info, *rest) -> jax.Array:
        array = load_param(info, *rest)
        wrong = info.path == "final_norm" and info.sharding.mesh.shape["tensor"] == 4
        return jax.device_put(array * factor, info.sharding) if wrong else array

    monkeypatch.setattr(load, "load_param", off)


def test_verify_exits_1_where_one_mesh_differs(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: TWO_MESHES)
    _break_one_weight(monkeypatch, 1.001)  # no greedy token changes: the logits alone tell
    outcome = _verify(capsys, tiny_dir, "--layout", "ep-tp", "--json")
    assert outcome.code == 1
    good, bad = _objects(outcome)
    assert (good["passed"], bad["passed"]) == (True, False)
    assert bad["max_logit_error"] > 1e-4


def test_verify_counts_a_mesh_whose_logits_are_not_finite_as_different(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: TWO_MESHES[1:])
    _break_one_weight(monkeypatch, float("nan"))
    outcome = _verify(capsys, tiny_dir, "--layout", "ep-tp", "--json")
    assert outcome.code == 1
    (found,) = _objects(outcome)
    assert (found["passed"], found["num_equal"], found["num_tokens"]) == (False, 0, 12)
    assert found["max_logit_error"] is None


def test_verify_counts_tokens_that_differ(capsys, tiny_dir, monkeypatch):
    monkeypatch.setattr(verify, "all_meshes", lambda num_devices: TWO_MESHES[1:])
    _break_one_weight(monkeypatch, -1.0)
    outcome = _verify(capsys, tiny_dir, "--layout", "ep-tp")
    assert outcome.code == 1
    assert "DIFFERENT" in outcome.out
    assert "of 12" in outcome.out
    assert "12 of 12" not in outcome.out
    assert "0 of 1 placements match one device" in outcome.out


def test_bench_prints_one_object_a_case(capsys, tiny_dir):
    options = ["--mesh", MESH, "--dtype", "float32", "--cases", "1x4x2,2x4x2", "--repeats", 1, "--json"]
    outcome = jaxmoe(capsys, "bench", tiny_dir(CASE), *options)
    assert outcome.code == 0
    first, second = _objects(outcome)
    assert (first["case"], second["case"]) == ("1x4x2", "2x4x2")
    assert first["mesh"] == {"data": 2, "pipeline": 1, "expert": 2, "tensor": 2}
    assert first["seconds"] > 0
    assert first["new_tok_s"] == pytest.approx(2 / first["seconds"], rel=0.2)

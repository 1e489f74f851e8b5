"""jaxmoe inspect for people and as JSON, and its exit code."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from jaxmoe.engine.step_traffic import StepTraffic
from jaxmoe.parallel.collectives import CollectiveOp

from .commands import jaxmoe

CASE = "qwen3_moe_norm"
OPTIONS = ["--mesh", "data=2,tensor=2,expert=2", "--max-num-seqs", 8, "--context", 32]


def test_json_is_one_object_with_every_parameter_and_collective(capsys, tiny_dir, tiny_llm):
    outcome = jaxmoe(capsys, "inspect", tiny_dir(CASE), *OPTIONS, "--dtype", "float32", "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    found = json.loads(outcome.out)
    llm = tiny_llm(CASE, OPTIONS[1])
    assert [one["shape"] for one in found["parameters"]] == [list(leaf.shape) for leaf in llm._runner.leaves]
    on_a_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in llm._runner.leaves)
    assert found["bytes"]["device"] == sum(one["bytes"]["device"] for one in found["parameters"]) == on_a_device
    assert found["mesh"] == {"data": 2, "pipeline": 1, "expert": 2, "tensor": 2}
    assert (found["layout"], found["dtype"], found["steps"]["dtype"]) == ("ep-tp", "float32", "float32")
    assert found["as_planned"]
    assert all(one["count"] == one["planned"] > 0 for one in found["collectives"])
    kinds = {(one["phase"], one["op"]) for one in found["collectives"]}
    assert kinds == {
        (phase, op) for phase in ("prefill", "decode") for op in ("all-reduce", "all-gather", "all-to-all")
    }


def test_a_config_alone_is_enough_on_stages_and_in_another_layout(capsys, changed_dir, tmp_path):
    shutil.copy(changed_dir(CASE, num_hidden_layers=5) / "config.json", tmp_path / "of_mine.json")
    options = ["--mesh", "pipeline=2,tensor=2,expert=2", "--layout", "tp-ep", "--virtual-stages", 2, *OPTIONS[2:]]
    outcome = jaxmoe(capsys, "inspect", tmp_path / "of_mine.json", *options)
    assert outcome.code == 0
    words = ("pipeline=2 x expert=2 x tensor=2 on 8 cpu", "layout tp-ep", "moe_expert: expert, tensor", "replicas")
    assert all(word in outcome.out for word in words)
    assert "steps are compiled in float32" in outcome.out  # the case is of bfloat16
    assert "DIFFERS" not in outcome.out
    assert outcome.out.endswith("prefill and decode: collectives match the plan\n")


def test_dispatch_is_that_which_was_asked_for(capsys, tiny_dir):
    command = ["inspect", tiny_dir(CASE), *OPTIONS, "--kv-dtype", "int8", "--dispatch", "all_gather", "--json"]
    outcome = jaxmoe(capsys, *command)
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert "reduce-scatter" in {one["op"] for one in found["collectives"]}
    assert (found["dispatch"], found["steps"]["kv_dtype"]) == ("all_gather", "int8")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_step_that_is_not_as_planned_is_marked_and_an_error(as_json, capsys, tiny_dir, monkeypatch):
    planned = StepTraffic.planned_decode_step
    more = Counter({CollectiveOp(op="all-reduce", axes=("data",), result_bytes=12): 3})
    more_planned = lambda self, bucket, **options: planned(self, bucket, **options) + more  # noqa: E731
    monkeypatch.setattr(StepTraffic, "planned_decode_step", more_planned)  # of decoding
    outcome = jaxmoe(capsys, "inspect", tiny_dir(CASE), *OPTIONS, *["--json"] * as_json)
    assert outcome.code == 1
    if as_json:
        found = json.loads(outcome.out)
        (wrong,) = [one for one in found["collectives"] if one["count"] != one["planned"]]
        assert (wrong["phase"], wrong["axes"], wrong["count"], wrong["planned"]) == ("decode", ["data"], 0, 3)
        assert not found["as_planned"]
        return
    (marked,) = [line for line in outcome.out.splitlines() if "DIFFERS" in line]
    assert "data" in marked
    assert "decode is not as planned: 1 of " in outcome.out
    assert "prefill is not" not in outcome.out


def test_one_device_says_nothing(capsys, tiny_dir, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    outcome = jaxmoe(capsys, "inspect", tiny_dir(CASE), "--mesh", "data=1", *OPTIONS[2:])
    assert outcome.code == 0
    assert "collectives of a step" not in outcome.out
    assert "replicas" not in outcome.out

"""The manifest: what it states, and a second run held against it."""

from __future__ import annotations

import hashlib
import json

import pytest

from jaxmoe.errors import CheckpointError
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.train.loop import HeldOut, TrainResult
from jaxmoe.train.step import TrainState
from scripts.demo_manifest import MANIFEST, manifest_of, record_reproduction
from scripts.demo_recipe import DEMO_RECIPE
from tests.conftest import mesh_of


def result(nats_per_byte: float) -> TrainResult:
    held_out = HeldOut(
        nats_per_token=3 * nats_per_byte,
        nats_per_byte=nats_per_byte,
        bits_per_byte=nats_per_byte / 0.6931,
        num_tokens=100,
        num_bytes=300,
    )
    return TrainResult(
        state=TrainState((), ()),
        held_out=held_out,
        loss_nats_per_token=2.0,
        balance=2.1,
        num_tokens=10_000,
        wall_s=60.04,
        cpu_s=80.0,
    )


def test_manifest_states_the_recipe_and_every_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    placement = MeshPlacement(mesh=mesh_of("data=2"))
    manifest = manifest_of(
        tmp_path, recipe=DEMO_RECIPE, corpus={"license": "PSF-2.0"}, placement=placement, result=result(1.0),
        num_parameters=7, samples=[],
    )  # fmt: skip
    assert json.loads(json.dumps(manifest)) is not None
    assert manifest["recipe"]["model"]["moe"]["num_experts"] >= 8
    assert manifest["recipe"]["learning_rate"] == DEMO_RECIPE.learning_rate
    assert manifest["held_out"]["nats_per_byte"] == 1.0
    assert manifest["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()


def test_a_second_run_is_held_against_the_first(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"held_out": {"nats_per_byte": 1.0}, "reproduced": []}))
    placement = MeshPlacement(mesh=mesh_of("data=1"))
    assert record_reproduction(tmp_path, result(1.01), placement) == pytest.approx(0.01)
    assert record_reproduction(tmp_path, result(0.98), placement) == pytest.approx(-0.02)
    runs = json.loads((tmp_path / MANIFEST).read_text())["reproduced"]
    assert [run["held_out"]["nats_per_byte"] for run in runs] == [1.01, 0.98]
    assert runs[0]["environment"]["packages"]["jax"]


def test_there_must_be_a_first_run(tmp_path):
    with pytest.raises(CheckpointError, match="has no manifest"):
        record_reproduction(tmp_path, result(1.0), MeshPlacement(mesh=mesh_of("data=1")))

"""Bytes that are told of a model before it is loaded are those its arrays take, number by number."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.aot.request import InspectRequest
from jaxmoe.model.kernels import choose_kernels, prepare_kernels
from jaxmoe.parallel.layouts import LAYOUTS
from jaxmoe.report.parameters import ByteCounts, parameter_reports, report, total_bytes
from jaxmoe.report.verify import all_meshes, all_trials

from ..conftest import XLA, mesh_of

ALL = "data=2,tensor=2,expert=2"


def reports_of(llm: LLM, directory, mesh: str, **asked):
    """As for a model that is not loaded."""
    question = InspectRequest.of(model=str(directory), mesh=mesh, max_num_seqs=8, context=32, dtype="float32", **asked)
    config, _ = question.checked_model()
    kernels = prepare_kernels("float32", {}, choose_kernels("float32", {}))
    return parameter_reports(question.runner(config, llm.mesh, kernels))


@pytest.mark.parametrize(
    ("name", "keys", "mesh", "asked"),
    [
        ("qwen3_moe_norm", {}, ALL, {}),
        ("qwen3_moe_norm", {"num_hidden_layers": 3}, "pipeline=2,tensor=4", {}),  # a slot without a layer, copied heads
        ("qwen3_moe_norm", {"num_hidden_layers": 5}, "pipeline=2,tensor=2", {"virtual_stages": 2}),
        ("qwen2_moe_mlp_only", {"num_hidden_layers": 5}, "pipeline=2,expert=4", {}),  # beside the stages, seven experts
        ("mixtral_window", {}, "expert=2,tensor=4", {"layout": "tp-ep"}),  # five experts, three heads
        ("olmoe_full_norm", {}, "tensor=8", {}),  # norms over copied heads
        ("olmoe_full_norm", {}, ALL, {"layout": "tp"}),
        ("llama_linear_bias", {}, "data=2,tensor=4", {"layout": "dp-ep"}),
    ],
)
def test_bytes_are_those_of_the_arrays(name, keys, mesh, asked, changed_dir):
    directory = changed_dir(name, **keys)
    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="float32", **asked)
    found = reports_of(llm, directory, mesh, **asked)
    leaves = llm._runner.leaves
    for one, leaf in zip(found, leaves, strict=True):
        shards = [shard.data.nbytes for shard in leaf.addressable_shards]
        assert one.shape == leaf.shape
        assert set(shards) == {one.bytes.device}
        assert one.bytes.padding == np.count_nonzero(np.asarray(leaf) == 0) * 4, one.path
        assert one.bytes.model + one.bytes.padding + one.bytes.head_copies == leaf.nbytes
        assert one.bytes.model == np.prod(one.config_shape) * 4
        assert one.bytes.replicas == sum(shards) - leaf.nbytes
    total = total_bytes(found)
    devices = [[shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device]
               for device in llm.mesh.devices.flat]  # fmt: skip
    assert {sum(each) for each in devices} == {total.device}
    assert total.device * llm.mesh.size == total.model + total.padding + total.head_copies + total.replicas


def test_one_device_holds_the_model_and_nothing_else(tiny_dir, tiny_llm):
    llm = tiny_llm("qwen3_moe_norm")
    total = total_bytes(reports_of(llm, tiny_dir("qwen3_moe_norm"), "data=1"))
    assert total == ByteCounts(device=total.model, model=total.model, padding=0, head_copies=0, replicas=0)


def test_what_splits_a_parameter_is_named(changed_dir):
    directory = changed_dir("qwen3_moe_norm", num_hidden_layers=3)
    llm = LLM.load(directory, mesh=mesh_of("pipeline=2,tensor=4"), dtype="float32", kernels=XLA)
    found = {one.path: one.as_json() for one in reports_of(llm, directory, "pipeline=2,tensor=4")}
    width, slots, expert_width = llm.config.hidden_size, 4, llm.config.moe.intermediate_size
    assert found["embed"]["sharding"] == {"vocab": ["pipeline", "tensor"], "width": []}
    qkv = found["segments/0/0/attention/qkv"]
    assert (qkv["shape"], qkv["config_shape"]) == ([slots, width, 4, 3, 16], [3, width, 2, 4, 16])
    # Of three layers, two key/value heads once more, each a key and a value of 16.
    assert qkv["bytes"]["head_copies"] == 3 * width * 2 * 2 * 16 * 4
    down = found["segments/0/0/moe/experts/down"]
    assert down["sharding"] == {"layer": ["pipeline"], "moe_expert": [], "moe_ffn": ["tensor"], "width": []}
    assert down["bytes"]["device"] == 2 * 10 * (expert_width // 4) * width * 4
    assert json.loads(json.dumps(found)) == found


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_say_what_was_planned_on_every_mesh_in_every_layout(layout, changed_dir):
    config = str(changed_dir("qwen3_moe_norm", num_hidden_layers=8))
    for trial in all_trials(all_meshes(8)):
        if str(trial.layout) != layout:
            continue
        mesh = ",".join(f"{axis}={size}" for axis, size in trial.mesh.items())
        found = report(
            InspectRequest.of(model=config, mesh=mesh, max_num_seqs=16, context=32, chunk_tokens=32, layout=layout)
        )
        assert found["as_planned"], [one for one in found["collectives"] if one["count"] != one["planned"]]

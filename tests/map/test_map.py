"""What the map says of every device is what JAX would place there, and what it plays is what a step says."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.aot.compile import engine_state, held_bytes, step_bucket
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.map.data import MapRequest, map_data
from jaxmoe.map.fabric import fabric_of, torus_shape
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.weights.source import model_name

from ..cli.commands import parsed
from ..conftest import mesh_of
from .parts import answer_of, bytes_by_part

ALL = "data=2,tensor=2,expert=2"
CASES = [
    ("qwen3_moe_norm", {}, ALL, {}),
    ("qwen3_moe_norm", {"num_hidden_layers": 3}, "pipeline=2,tensor=4", {}),  # a slot without a layer, copied heads
    ("qwen3_moe_norm", {"num_hidden_layers": 5}, "pipeline=2,tensor=2,data=2", {"virtual_stages": 2}),
    ("qwen2_moe_mlp_only", {"num_hidden_layers": 5}, "pipeline=2,expert=4", {}),  # beside the stages, seven experts
    ("mixtral_window", {}, "expert=2,tensor=4", {"layout": "tp-ep"}),
    ("qwen2_moe_shared", {}, ALL, {"layout": "tp-ep-sp", "kv_dtype": "int8"}),
    ("olmoe_full_norm", {}, ALL, {"layout": "tp", "weights_dtype": "int8"}),
    ("deepseek_v3_groups", {}, "data=4,expert=2", {"layout": "cp-ep-tp"}),
    ("gpt_oss_window", {}, ALL, {"layout": "dp-ep", "kernels": {"dispatch": "all_gather"}}),
    ("llama_linear_bias", {}, "data=2,tensor=4", {}),
    ("llama4_text_scout", {}, "data=1", {}),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def drawn(request, changed_dir):
    """(the question, what the map says, the same model on eight devices that are there)."""
    name, keys, mesh, asked = request.param
    question = MapRequest.of(
        model=str(changed_dir(name, **keys)), mesh=mesh, max_num_seqs=8, context=32, chunk_tokens=32, dtype="float32",
        **asked,
    )  # fmt: skip
    config, _ = question.checked_model()
    return question, map_data(question), question.runner(config, mesh_of(mesh), KernelConfig(**question.kernels))


def test_bytes_are_those_a_device_holds(drawn):
    question, data, runner = drawn
    weights, kv = held_bytes(runner, **question.sizes)
    assert data["bytes"] == {"weights": weights, "kv": kv}
    parts = bytes_by_part(data["arrays"], data["mesh"])
    assert (sum(parts.values()) - parts["kv"], parts["kv"]) == (weights, kv)


def test_slices_are_those_jax_gives_each_device_and_tile_every_array(drawn):
    question, data, runner = drawn
    pages = [array for blocks in engine_state(runner, **question.sizes).pages for array in blocks[0]]
    real = [*runner.leaves, *pages]
    assert len(real) == len(data["arrays"])
    mesh = runner.placement.mesh
    for array, leaf in zip(data["arrays"], real, strict=True):
        assert array["shape"] == list(leaf.shape), array["path"]
        sharding = NamedSharding(mesh, PartitionSpec(*(tuple(axes) or None for axes in array["axes"])))
        places = sharding.devices_indices_map(leaf.shape)
        assert places == leaf.sharding.devices_indices_map(leaf.shape), array["path"]
        held = np.zeros(leaf.shape, np.int32)
        for place in places.values():
            held[place] += 1
        split = math.prod(data["mesh"][axis] for axes in array["axes"] for axis in axes)
        assert (held == mesh.size // split).all(), array["path"]


def test_what_is_played_sums_to_what_is_planned(drawn):
    question, data, runner = drawn
    for phase, step in data["steps"].items():
        bucket = step_bucket(runner, phase, **question.sizes)
        planned = runner.traffic.planned(bucket) if phase == "prefill" else runner.traffic.planned_decode_step(bucket)
        played: Counter[CollectiveOp] = Counter()
        for stop in step["sites"]:
            one = CollectiveOp(op=stop["op"], axes=tuple(stop["axes"]), result_bytes=stop["bytes"])
            played[one] += stop["count"]
            assert stop["sent"] == one.sent_bytes(math.prod(data["mesh"][axis] for axis in one.axes))
        assert played == planned
        rows = {
            (row["op"], tuple(row["axes"]), row["bytes"]): row for row in data["collectives"] if row["phase"] == phase
        }
        assert {key: row["planned"] for key, row in rows.items()} == {
            (one.op, one.axes, one.result_bytes): count for one, count in planned.items()
        }
        assert {row["compiled"] for row in rows.values()} <= {None}
    assert json.loads(json.dumps(data)) == data


def test_every_layer_says_what_its_block_says(changed_dir):
    """One dense layer before MoE layers, tokens shared out: stops by segment, in the order a token passes them."""
    config = str(changed_dir("deepseek_v3_groups"))
    data = map_data(
        MapRequest.of(model=config, mesh="expert=2,tensor=2", max_num_seqs=16, context=32, layout="ep-tp-sp")
    )
    dense, sparse = (
        [(stop["location"], stop["op"]) for stop in data["steps"]["prefill"]["sites"] if stop["segment"] == segment]
        for segment in (0, 1)
    )
    attention = [("attention", "all-gather"), ("attention", "reduce-scatter")]
    assert dense == [*attention, ("mlp", "all-gather"), ("mlp", "reduce-scatter")]
    exchange = [("dispatch", "all-to-all"), ("combine", "all-to-all")]
    assert sparse == [*attention, ("experts", "all-gather"), *exchange, ("experts", "reduce-scatter")]


def question(changed_dir, **asked) -> MapRequest:
    plain = dict(model=str(changed_dir("qwen3_moe_norm")), mesh=ALL, max_num_seqs=8, context=32, dtype="float32")
    return MapRequest.of(**(plain | asked))


def test_a_compiled_program_is_shown_beside_the_plan(changed_dir):
    asked = question(changed_dir)
    plain = map_data(asked)
    answer = answer_of(plain)
    same = map_data(asked, result=answer)
    assert all(row["compiled"] == row["planned"] for row in same["collectives"])
    assert same["compiled"] == {"target": "h100:1x8", "bytes": answer["bytes"]}
    answer["collectives"][0]["count"] += 1
    answer["collectives"].append(answer["collectives"][0] | {"bytes": 12, "planned": 0, "count": 2})
    differs = [row for row in map_data(asked, result=answer)["collectives"] if row["compiled"] != row["planned"]]
    assert [(row["compiled"] - row["planned"], row["location"] == []) for row in differs] == [(1, False), (2, True)]
    answer["collectives"] = [row for row in answer["collectives"] if row["phase"] == "decode"]
    half = map_data(asked, result=answer)["collectives"]
    assert {row["compiled"] is None for row in half if row["phase"] == "prefill"} == {True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": {"data": 1, "pipeline": 1, "expert": 8, "tensor": 1}}, "mesh=data=1,pipeline=1,expert=8,tensor=1"),
        ({"max_num_seqs": 9}, "max_num_seqs=9, this map has max_num_seqs=8: make --max-num-seqs equal"),
        ({"layout": "tp"}, "layout=tp, this map has layout=ep-tp"),
        ({"family": "llama"}, "family=llama, this map has family=qwen3_moe"),
    ],
)
def test_an_answer_to_another_question_is_refused(changes, words, changed_dir):
    asked = question(changed_dir)
    with pytest.raises(ConfigError, match=words):
        map_data(asked, result=answer_of(map_data(asked), **changes))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["virtual_stages"], "has no virtual_stages, so it cannot be compared .* write it again with jaxmoe compile"),
        (["max_num_seqs", "target"], "has no target, max_num_seqs, so"),
    ],
)
def test_an_answer_that_does_not_say_what_was_asked_is_refused(missing, words, changed_dir):
    """As of a version that called these otherwise: an answer to another question would pass."""
    asked = question(changed_dir)
    answer = {name: value for name, value in answer_of(map_data(asked)).items() if name not in missing}
    with pytest.raises(ConfigError, match=words):
        map_data(asked, result=answer)


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (dict(hardware="b20"), MeshError, "did you mean b200"),
        (dict(hardware="v5p", target="h100:1x8"), ConfigError, "hardware v5p and target h100:1x8 differ"),
        (dict(hardware="a100", target="v5e:2x4"), ConfigError, "hardware a100 and target v5e:2x4 differ"),
        (dict(hardware="mi300x", target="h100:1x8"), ConfigError, "hardware mi300x and target h100:1x8 differ"),
        (dict(hardware=""), MeshError, "hardware '' is no preset"),
        (dict(target=""), ConfigError, "unknown device ''"),
        (dict(micro_batches=4), ConfigError, "micro_batches=4 needs stages"),
        (dict(micro_batches=99, mesh="pipeline=2,tensor=4"), ConfigError, r"micro_batches=99 must lie in \[1, 64\]"),
        (dict(mesh="data=2048"), ConfigError, "the map draws at most 1024"),
    ],
)
def test_questions_that_make_no_sense(asked, kind, words, changed_dir):
    with pytest.raises(kind, match=words):
        map_data(question(changed_dir, **asked))


def test_devices_stand_on_their_fabric():
    assert torus_shape(128, 3) == (4, 4, 8)
    assert torus_shape(32, 2) == (4, 8)
    b200 = fabric_of(read_hardware("b200"), 16)
    assert (b200.kind, b200.node, b200.domain, b200.platform) == ("switch", 8, 8, "gpu")
    v5p = fabric_of(read_hardware("v5p"), 64)
    assert (v5p.shape, v5p.wraps, v5p.node) == ((4, 4, 4), (True,) * 3, 4)
    assert fabric_of(read_hardware("v5e"), 32).wraps == (False, False)
    assert fabric_of(read_hardware("v5p"), 16, shape=(2, 2, 4)).wraps == (False, False, True)
    assert (v5p.last_shape, v5p.last_wraps) == (v5p.shape, v5p.wraps)
    part = fabric_of(read_hardware("v5e"), 300)
    assert (part.domain, part.shape, part.last_shape) == (256, (16, 16), (4, 11))  # 44 devices are no 16 x 16
    assert part.as_json()["last_wraps"] == [False, False]
    plain = fabric_of(None, 32)
    assert (plain.given, plain.node, plain.hbm_bytes) == (False, 32, None)


def test_the_timeline_goes_up_to_the_chunks_there_are(changed_dir):
    for layers, virtual_stages, most in ((64, 16, 16), (64, 1, 8), (8, 2, 4)):
        config = str(changed_dir("qwen3_moe_norm", num_hidden_layers=layers))
        found = map_data(
            MapRequest.of(model=config, mesh="pipeline=2", max_num_seqs=8, context=32, virtual_stages=virtual_stages)
        )
        assert [part["max_virtual_stages"] for part in found["segments"] if part["stages"] > 1] == [most]


def test_a_mesh_preset_brings_its_hardware(changed_dir):
    assert map_data(question(changed_dir, mesh="b200-2x8"))["fabric"]["name"] == "b200"
    assert map_data(question(changed_dir, mesh="b200-2x8", hardware="h100"))["fabric"]["name"] == "h100"
    of_target = map_data(question(changed_dir, mesh="expert=16", target="tpu7x:2x2x2"))["fabric"]
    assert (of_target["name"], of_target["shape"]) == ("tpu7x", [2, 2, 4])


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"layout": "tp-ep-sp", "kv_dtype": "int8", "weights_dtype": "int8"}, {}),
        ({"kernels": {"dispatch": "all_gather", "layers": "unroll"}}, {"dispatch": "all_gather", "layers": "unroll"}),
        ({"mesh": {"pipeline": 2, "tensor": 8}, "virtual_stages": 2}, {}),
    ],
)
@pytest.mark.parametrize(("hardware", "hosts"), [(None, 1), ("h100", 2), ("v5p", 4), ("cpu-8", 2)])
def test_every_host_has_its_command(changed_dir, asked, options, hardware, hosts):
    model = str(changed_dir("qwen3_moe_norm", num_hidden_layers=4))
    asked = {"mesh": "data=2,expert=2,tensor=4", "model": model, **asked}
    one = question(changed_dir, **asked, hardware=hardware)
    data = map_data(one)
    assert len(data["launch"]) == hosts == -(-16 // data["fabric"]["node"])
    for index, line in enumerate(data["launch"]):
        given, joining = parsed(line)
        again = MapRequest.of(
            given["model"], context=32, **{name: given[name] for name in ("mesh", "layout", "virtual_stages", "dtype",
            "weights_dtype", "kv_dtype", "max_num_seqs")}, kernels=options, hardware=hardware,
        )  # fmt: skip
        assert (given["model"], {name: given[name] for name in options}) == (one.model, options)
        assert map_data(again) == data
        assert given["devices"] == (8 if hardware == "cpu-8" else None)
        several = ("HOST0:PORT", hosts, index) if hosts > 1 else (None, None, None)
        assert (joining["coordinator"], joining["num_processes"], joining["process_id"]) == several
    address = ["HOST0:PORT is the address of the first host and a free port there"]
    assert data["launch_placeholders"] == (address if hosts > 1 else [])


def test_models_have_names(tmp_path):
    assert model_name("demo") == "demo"
    assert model_name("configs/Qwen--Qwen3.json") == "Qwen--Qwen3"
    assert model_name(str(tmp_path / "mine" / "config.json")) == "mine"

"""Layouts: they check themselves, read from text, and mean the same model with exactly the traffic they plan."""

from __future__ import annotations

from dataclasses import fields

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe import LLM, AsyncEngine, SamplingParams
from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.aot.request import InspectRequest
from jaxmoe.engine.batch import bucket_with
from jaxmoe.errors import ConfigError, LayoutError
from jaxmoe.families import read_config
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.ops.dispatch import BACKENDS, HIERARCHICAL
from jaxmoe.parallel.layouts import LAYOUTS, ShardingLayout, parse_layout
from jaxmoe.parallel.mesh import PlannedMesh

from ..agreement import answers, assert_same_answers
from ..aot.programs import assert_steps_hold_what_is_planned, step_program
from ..conftest import NATIVE, XLA, mesh_of
from ..engine.test_engine import requests_of, twice_with_pages_that_come_back
from ..tiny.cases import CASES_BY_NAME

pytestmark = pytest.mark.usefixtures("few_block_sizes")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3] * 2, [2, 7, 1], [5] * 9, [8, 2, 8], [1, 8]]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
CASES = ["qwen2_moe_shared", "mixtral_six_experts", "qwen3_moe_sparse_step"]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_layouts_read_from_their_names_and_from_what_they_print(name):
    layout = LAYOUTS[name]
    assert str(layout) == name
    parts = {one.name: getattr(layout, one.name) for one in fields(layout)}
    assert parse_layout(",".join(f"{part} = {' + '.join(axes)}" for part, axes in parts.items() if axes)) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fastest", "'fastest' must be one of ep-tp, tp-ep, dp-ep, tp"),
        ("batch=data,heads=tensor", "the parts are batch, split, experts, expert_width, context, sequence"),
        ("batch=data,batch=expert", "names 'batch' twice"),
        ("batch=data+model", "batch='model' must be one of data, expert, tensor"),
        ("batch=data+pipeline", "batch='pipeline' must be one of"),
        ("batch=data+expert+tensor,split=tensor", "axis 'tensor' twice in batch, split, context"),
        ("batch=data+expert,context=data,split=tensor", "axis 'data' twice in batch, split, context"),
        ("batch=data+expert,split=tensor,expert_width=tensor,sequence=tensor+tensor", "twice in sequence"),
        ("batch=data+expert,split=tensor,expert_width=tensor,sequence=data", "'data' must be one of split=tensor"),
        ("batch=data+expert,split=tensor,experts=tensor,expert_width=tensor", "twice in experts, expert_width"),
        ("batch=data,split=tensor,experts=tensor", "does not use axis 'expert'"),
        ("batch=data+expert,split=tensor,experts=expert", "must cover exactly split=tensor"),
        ("batch=data+expert,split=tensor,experts=tensor+expert", "axes of batch and context first"),
        ("batch=data,split=expert+tensor,experts=expert+tensor,sequence=tensor", "then axes of sequence"),
        (
            "batch=data,split=expert+tensor,experts=expert,expert_width=tensor,sequence=tensor+expert",
            "sequence must name axes of experts first",
        ),
    ],
)
def test_layouts_that_cannot_be_are_named(text, words):
    with pytest.raises(LayoutError) as error:
        parse_layout(text)
    assert words in str(error.value)


_AXES = st.lists(st.sampled_from(["data", "expert", "tensor"]), max_size=3).map(tuple)


@given(batch=_AXES, split=_AXES, context=_AXES, sequence=_AXES, experts=_AXES, expert_width=_AXES)
def test_a_layout_that_is_accepted_gives_every_axis_one_work(batch, split, context, sequence, experts, expert_width):
    try:
        layout = ShardingLayout(batch, split, experts, expert_width, context, sequence)
    except LayoutError:
        return
    assert sorted(batch + split + context) == ["data", "expert", "tensor"]
    assert len(set(experts + expert_width)) == len(experts + expert_width)
    pairs = (("token", "kv_head"), ("token", "ffn"), ("token", "vocab"), ("moe_expert", "moe_ffn"))
    for dims in (*pairs, ("sequence_sharded",), ("page", "page_token", "kv_head")):
        axes = [axis for dim in dims for axis in layout.table[dim]]
        assert len(set(axes)) == len(axes)


LAYOUT_MESHES = [
    ("tp-ep", "data=2,tensor=2,expert=2"),
    ("tp-ep", "tensor=4,expert=2"),
    ("dp-ep", "data=2,tensor=2,expert=2"),
    ("dp-ep", "pipeline=2,tensor=2,expert=2"),
    ("tp", "data=2,tensor=2,expert=2"),
    ("tp", "pipeline=2,tensor=2,expert=2"),
    ("batch=expert+tensor,split=data,experts=tensor+data,expert_width=", "data=2,tensor=2,expert=2"),
    ("ep-tp-sp", "data=2,tensor=2,expert=2"),
    ("ep-tp-sp", "pipeline=2,tensor=4"),
    ("tp-ep-sp", "data=2,tensor=2,expert=2"),
    ("tp-ep-sp", "pipeline=2,tensor=2,expert=2"),
    ("tp-sp", "tensor=4,expert=2"),
    ("cp-ep-tp", "data=2,tensor=2,expert=2"),
    ("cp-ep-tp", "data=2,pipeline=2,tensor=2"),
    ("cp-ep-tp", "data=2,pipeline=2,expert=2"),
    ("batch=data,split=expert+tensor,experts=expert,expert_width=tensor,sequence=expert+tensor", "tensor=4,expert=2"),
    ("batch=,context=data+expert,split=tensor,experts=expert,expert_width=tensor,sequence=tensor", "data=2,expert=4"),
    (
        "batch=,context=data+expert,split=tensor,experts=expert,expert_width=tensor,sequence=tensor",
        "data=2,tensor=2,expert=2",
    ),
]
LONGER = (1, 3, 4, 5, 6, 8, 13, 14, 16, 17)  # like others that are run
CONTEXT = 12  # cp-ep-tp
WITH_NATIVE = (0, 9, 11, 15)  # half of those that are run have the kernels of this machine, half those of accelerators
FASTEST = {"layers": "scan"}
# Every layout with one kind of model; all with all in the sweep.
ONE_EACH = [
    pytest.param(name, layout, mesh, FASTEST if number in WITH_NATIVE else XLA, number in (*WITH_NATIVE, CONTEXT))
    if (number - at) % len(CASES) == 0 and number not in LONGER
    else pytest.param(name, layout, mesh, XLA, True, marks=pytest.mark.sweep)
    for number, (layout, mesh) in enumerate(LAYOUT_MESHES)
    for at, name in enumerate(CASES)
]
FRONTIER = [
    pytest.param(name, layout, mesh, XLA, True, marks=pytest.mark.sweep)
    for name in ("deepseek_v3_groups", "gpt_oss_window", "llama4_text_scout", "glm4_moe_norm")
    for layout, mesh in LAYOUT_MESHES
]


@pytest.mark.parametrize(("name", "layout", "mesh", "kernels", "scored"), ONE_EACH + FRONTIER)
def test_every_layout_gives_what_one_device_gives_and_says_what_was_planned(
    name, layout, mesh, kernels, scored, changed_dir
):
    """scored: the program that scores whole prompts, too."""
    directory = changed_dir(name, num_hidden_layers=4)
    llm = LLM.load(directory, mesh=mesh_of(mesh), layout=layout, dtype="float32", kernels=kernels)
    wanted, logits = _one_device(directory)
    assert_same_answers(answers(llm, PROMPTS, PARAMS), wanted)
    assert_steps_hold_what_is_planned(llm)
    if scored:
        np.testing.assert_allclose(llm.last_logits(PROMPTS), logits, atol=1e-4)


# Kinds of dispatch, in layouts whose experts lie over two axes; with a pipeline, and with strips of tokens.
KINDS = [
    pytest.param(kind, layout, mesh, marks=() if (number + at) % 4 == 0 else pytest.mark.sweep)
    for at, kind in enumerate(list(BACKENDS)[1:])
    for number, (layout, mesh) in enumerate(
        [
            ("dp-ep", "tensor=2,expert=4"),
            ("tp-ep-sp", "pipeline=2,tensor=2,expert=2"),
            ("dp-ep", "pipeline=2,tensor=2,expert=2"),
            ("tp-ep-sp", "data=2,tensor=2,expert=2"),
        ]
    )
]


@pytest.mark.parametrize(("kind", "layout", "mesh"), KINDS)
def test_every_dispatch_gives_what_one_device_gives_and_says_what_was_planned(kind, layout, mesh, changed_dir):
    directory = changed_dir("mixtral_six_experts", num_hidden_layers=4)
    llm = LLM.load(
        directory, mesh=mesh_of(mesh), layout=layout, dtype="float32", kernels={"dispatch": kind, "layers": "scan"}
    )
    assert_same_answers(answers(llm, PROMPTS, PARAMS), _one_device(directory)[0])
    assert_steps_hold_what_is_planned(llm)


@pytest.mark.parametrize("kind", HIERARCHICAL)
def test_levels_along_one_axis_are_refused(kind, tiny_dir):
    with pytest.raises(ConfigError, match=f"dispatch={kind} .* along expert alone: shard experts over two"):
        LLM.load(tiny_dir("mixtral_six_experts"), mesh=mesh_of("expert=8"), kernels={"dispatch": kind})


def test_gpus_that_a_ragged_exchange_does_not_reach_are_refused():
    config = read_config(CASES_BY_NAME["mixtral_six_experts"].config)
    asked = dict(model="", mesh="expert=16", max_num_seqs=16, context=64)
    for kind in ("ragged_all_to_all", "hierarchical_ragged"):
        layout = "ep-tp" if kind == "ragged_all_to_all" else "dp-ep"
        question = InspectRequest.of(**asked, kernels={"dispatch": kind}, layout=layout)
        axes = {"expert": 16} if kind == "ragged_all_to_all" else {"data": 2, "expert": 2, "tensor": 16}
        with pytest.raises(ConfigError, match=f"dispatch={kind} reaches 8 GPUs at most, .* among 16"):
            question.runner(config, PlannedMesh(axes, "gpu"), KernelConfig(dispatch=kind))


def assert_planned(llm, *, rows: int, blocks: int, decode_steps: int = 1) -> None:
    """A step of so many rows for each rank of a context, and blocks for each stage, holds what is planned."""
    stages, shares = llm.mesh.shape["pipeline"], llm._runner.context_ranks
    bucket = bucket_with(rows * shares * stages, blocks * stages, block_tokens=8, pages=3, stages=stages, shares=shares)
    planned = llm._runner.traffic.planned_program(bucket, max_decode_steps=decode_steps)
    assert collectives(step_program(llm, bucket, decode_steps=decode_steps).as_text(), llm.mesh) == planned


DECODING = [
    pytest.param(layout, mesh, marks=() if number == 9 else pytest.mark.sweep)
    for number, (layout, mesh) in enumerate(LAYOUT_MESHES)
]


@pytest.mark.parametrize(("layout", "mesh"), DECODING)
def test_decoding_steps_say_what_was_planned(layout, mesh, changed_dir):
    """With too few tokens to share out, with enough, and in a loop over several decode steps."""
    directory = changed_dir("qwen2_moe_shared", num_hidden_layers=4)
    llm = LLM.load(directory, mesh=mesh_of(mesh), layout=layout, dtype="float32", kernels=XLA)
    assert_planned(llm, rows=1, blocks=0)
    assert_planned(llm, rows=8, blocks=0)
    assert_planned(llm, rows=8, blocks=0, decode_steps=2)


_FOUND: dict = {}


def _one_device(directory):
    if directory not in _FOUND:
        llm = LLM.load(directory, mesh=mesh_of("data=1"), dtype="float32")
        _FOUND[directory] = answers(llm, PROMPTS, PARAMS), llm.last_logits(PROMPTS)
    return _FOUND[directory]


def test_layouts_plan_the_traffic_that_the_literature_gives_them(tiny_dir):
    """Of a mixture's layer on tensor=4,expert=2: how often each kind, and bytes of one exchange."""

    def planned(layout):
        llm = LLM.load(
            tiny_dir("mixtral_six_experts"), mesh=mesh_of("tensor=4,expert=2"), layout=layout, kernels=NATIVE
        )
        bucket = bucket_with(2, 0, block_tokens=8, pages=3, stages=1)
        layers, hidden = llm.config.num_hidden_layers, 2 * llm.config.hidden_size * llm._runner.itemsize
        found = {}
        for one, count in llm._runner.traffic.planned(bucket).items():
            found.setdefault((one.op, one.axes), [0, []])
            found[one.op, one.axes][0] += count
            found[one.op, one.axes][1].append(one.result_bytes / hidden)
        return layers, found

    layers, found = planned("dp-ep")  # attention says nothing; a dispatch and a combine a layer
    assert set(found) == {("all-to-all", ("expert", "tensor"))}
    assert found["all-to-all", ("expert", "tensor")][0] == 2 * layers
    layers, found = planned("tp")  # two all-reduces a layer and the embedding's
    assert found["all-reduce", ("expert", "tensor")][0] == 2 * layers + 1
    assert not any(op == "all-to-all" for op, _ in found)
    layers, found = planned("tp-ep")  # as ep-tp
    assert found["all-reduce", ("tensor",)][0] == 2 * layers + 1
    assert found["all-to-all", ("expert",)][0] == 2 * layers


ONE_WAY = [
    pytest.param(
        layout,
        kind,
        towards,
        marks=()
        if (layout, kind, towards)
        in {
            ("ep-tp", "all_to_all", "one expert"),
            ("tp-ep", "all_to_all", "one rank"),
            ("dp-ep", "hierarchical_ragged", "one expert"),
            ("dp-ep", "ragged_all_to_all", "one rank"),
        }
        else pytest.mark.sweep,
    )
    for layout, kind in [(layout, "all_to_all") for layout in ("ep-tp", "tp-ep", "dp-ep")]
    + [("dp-ep", kind) for kind in ("ragged_all_to_all", "hierarchical_ragged")]
    for towards in ("one expert", "one rank")
]


@pytest.mark.parametrize(("layout", "kind", "towards"), ONE_WAY)
def test_a_router_that_sends_all_tokens_one_way_drops_none(layout, kind, towards, changed_dir):
    """Weights of the router that make every token choose the same experts, whichever they are."""
    directory = changed_dir("mixtral_six_experts", num_experts_per_tok=1 if towards == "one expert" else 2)
    from safetensors.numpy import load_file, save_file

    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if key.endswith("gate.weight") and "block_sparse_moe" in key:
                tensors[key] = np.zeros_like(tensors[key])  # ties go to the lowest: experts 0 and 1, on one rank
        save_file(tensors, path)
    one = LLM.load(directory, mesh=mesh_of("data=1"), dtype="float32")
    many = LLM.load(
        directory, mesh=mesh_of("data=2,tensor=2,expert=2"), layout=layout, dtype="float32", kernels={"dispatch": kind}
    )
    assert_same_answers(answers(many, PROMPTS, PARAMS), answers(one, PROMPTS, PARAMS))


@pytest.mark.parametrize("layout", ["cp-ep-tp", pytest.param("tp-ep-sp", marks=pytest.mark.sweep)])
def test_an_engine_runs_requests_that_come_and_go(layout, changed_dir):
    """With keys and values of eight bits, pages that wait in host memory, and beginnings that are known."""
    llm = LLM.load(
        changed_dir("mistral_late_window" if layout == "tp-ep-sp" else "qwen3_moe_norm", num_hidden_layers=4),
        mesh=mesh_of("data=2,tensor=2,expert=2"), layout=layout, dtype="float32", kv_dtype="int8",
    )  # fmt: skip
    requests = requests_of(24, llm.config.vocab_size)
    page_gib = llm._runner.device_bytes_per_token * 4 / 2**30
    sizes = dict(max_num_seqs=8, context=48, kv_cache_gib=24 * page_gib, page_size=4, chunk_tokens=16)

    found = twice_with_pages_that_come_back(llm, requests, **sizes)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt, params in requests]
    assert found == alone


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_context_holds_that_many_times_the_tokens_in_the_same_memory(ranks, changed_dir):
    llm = LLM.load(
        changed_dir("qwen3_moe_norm", num_key_value_heads=1), mesh=mesh_of(f"data={ranks}"), layout="cp-ep-tp",
        dtype="float32",
    )  # fmt: skip
    kv_cache_gib = 10.5 * llm._runner.device_bytes_per_token * 4 / 2**30
    with AsyncEngine(
        llm, max_num_seqs=12, context=64, page_size=4, chunk_tokens=8, kv_cache_gib=kv_cache_gib
    ) as engine:
        stats, state = engine.stats(), engine._core._worker.state
        assert (stats["num_pages"], stats["page_size"]) == (10, 4 * ranks)
        held = {device: 0 for device in llm.mesh.devices.flat}
        for array in jax.tree.leaves(state.pages):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {10 * 4 * llm._runner.device_bytes_per_token}


def test_a_context_is_read_by_the_loop(tiny_dir):
    llm = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh_of("data=4"), layout="cp-ep-tp", dtype="float32")
    assert llm._runner.kernels.attention == "loop"
    with pytest.raises(ConfigError, match="attention=native reads whole pages"):
        LLM.load(
            tiny_dir("qwen3_moe_norm"), mesh=mesh_of("data=4"), layout="cp-ep-tp", dtype="float32",
            kernels={"attention": "native"},
        )  # fmt: skip

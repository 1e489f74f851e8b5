"""The line about tensor groups that leave a host, with what the planner estimates for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxmoe.api import loader
from jaxmoe.config import EngineConfig
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.planner.host_spans import preset_of, tensor_span_line
from jaxmoe.planner.links import LinkModel, RankGroup
from jaxmoe.weights.source import find_config
from jaxmoe.weights.stored import read_stored_config


def placed(mesh: str, layout: str = "ep-tp") -> MeshPlacement:
    return MeshPlacement(mesh=PlannedMesh(parse_mesh(mesh)), layout=parse_layout(layout))


def line(model: str, mesh: str, *, each: int, layout: str = "ep-tp", kind: str = "NVIDIA H200", requests: int = 64):
    """The line for hosts of this many devices each, which fill the mesh one after the other."""
    placement = placed(mesh, layout)
    hosts = (np.arange(placement.mesh.size) // each).reshape(placement.mesh.devices.shape)
    config = read_stored_config(find_config(model))
    return tensor_span_line(
        config, placement, hosts, device_kind=kind, dispatch="all_to_all", max_num_seqs=requests
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "each", "ranks", "inside", "rows"),
    [("tensor=16", 8, 16, 8, 64), ("data=2,tensor=16", 8, 16, 8, 32), ("tensor=6", 4, 6, 2, 64)],
)
def test_two_all_reduces_a_layer_take_what_their_links_take(mesh, each, ranks, inside, rows):
    """Attention and experts each add up rows of 7168 bfloat16 numbers."""
    links = LinkModel(read_hardware("h200"), devices=math.prod(parse_mesh(mesh).values()))
    one = CollectiveOp(op="all-reduce", axes=("tensor",), result_bytes=rows * 7168 * 2)
    over, near = (2e6 * links.seconds(one, RankGroup(ranks, count)) for count in (inside, ranks))
    assert over > 1.5 * near
    said = line("deepseek-v3.1", mesh, each=each)
    assert (
        f"tensor groups of {ranks} devices span 2 hosts or processes, so their all-reduces cross between them" in said
    )
    assert f"planned {over:,.0f} us a layer over the network against {near:,.0f} us inside a host" in said
    assert said.endswith("for 64 requests (hardware preset h200)")


def test_groups_that_stay_on_their_host_need_no_line():
    assert line("deepseek-v3.1", "data=2,expert=2,tensor=8", each=8) is None
    assert line("deepseek-v3.1", "data=2,expert=2,tensor=8", each=4) is not None


@pytest.mark.parametrize(
    ("layout", "mesh", "words"),
    [
        ("tp", "expert=2,tensor=16", "their all-reduces cross"),
        ("tp-ep-sp", "expert=2,tensor=16", "their collectives cross"),
        ("ep-tp", "pipeline=2,tensor=16", "their all-reduces cross"),
    ],
)
def test_other_layouts_and_stages_have_lines_too(layout, mesh, words):
    assert words in line("deepseek-v3.1", mesh, each=8, layout=layout)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("NVIDIA H200", ("h200", True)), ("NVIDIA H100 80GB HBM3", ("h100", True)), ("NVIDIA GB200", ("gb200", True)),
        ("NVIDIA A100-SXM4-80GB", ("a100", True)), ("AMD Instinct MI300X", ("mi300x", True)), ("cpu", ("cpu-8", True)),
        ("NVIDIA L40S", ("h100", False)),
    ],
)  # fmt: skip
def test_kinds_of_devices_have_presets(kind, preset):
    assert preset_of(kind) == preset


def test_a_kind_without_a_preset_is_named():
    said = line("demo", "tensor=16", each=8, kind="NVIDIA L40S")
    assert said.endswith("(no hardware preset is known for NVIDIA L40S: as for h100)")


@pytest.mark.parametrize(("process", "lines"), [(0, 1), (1, 0)])
def test_loading_says_it_in_one_process(process, lines, monkeypatch, caplog):
    import jax

    placement = MeshPlacement(mesh=loader.build_mesh(parse_mesh("data=2,tensor=4")))
    hosts = (np.arange(8) // 2).reshape(placement.mesh.devices.shape)
    monkeypatch.setattr(loader, "hosts_of", lambda mesh: hosts)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    config = read_stored_config(find_config("demo"))
    loader._warn_of_spans(EngineConfig(max_num_seqs=8), config, placement, dispatch="all_to_all")
    assert len(caplog.messages) == lines
    for message in caplog.messages:
        assert message.startswith("jaxmoe: mesh data=2 x pipeline=1 x expert=1 x tensor=4: tensor groups of 4 devices")
        assert message.endswith("for 8 requests (hardware preset cpu-8)")

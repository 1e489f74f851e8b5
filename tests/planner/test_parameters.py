"""What the planner says a device holds is what the abstract model holds, byte by byte."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from flax import nnx

from jaxmoe.aot.compile import abstract_runner, held_bytes
from jaxmoe.families import read_config, with_weights_dtype
from jaxmoe.model.kernels import choose_kernels
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.layouts import LAYOUTS, parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.memory import DeviceMemory
from jaxmoe.weights.params import parameter_table

from ..conftest import mesh_of
from ..tiny.cases import CASES, CASES_BY_NAME

MESHES = [("expert=4,tensor=2", "ep-tp"), ("data=2,expert=2,tensor=2", "tp-ep"), ("expert=2,tensor=4", "tp")]


def planned(text: str) -> PlannedMesh:
    return PlannedMesh(parse_mesh(text), "cpu")


def by_path(held: DeviceMemory) -> Counter[str]:
    found = Counter({param.path: size for param, size in held.outer})
    blocks = iter(held.blocks)
    for number, segment in enumerate(held.segments):
        for block in range(segment.period):
            one = next(blocks)
            for param, size in one.params:
                found[f"segments/{number}/{block}/{param.path}"] += size * one.num_slots
    return found


def of_abstract_model(config, placement: MeshPlacement) -> Counter[str]:
    shared = placement.num_shards("page_token") > 1
    kernels = choose_kernels("float32", {}, platform="cpu", shared_pages=shared, quantization=config.quantization)
    _, state = nnx.split(abstract_model(config, placement, dtype="float32", kernels=kernels))
    found: Counter[str] = Counter()
    for info in parameter_table(state, placement):
        path = info.path.removesuffix("/numbers").removesuffix("/scales")
        found[path] += int(np.prod(info.sharding.shard_shape(info.shape))) * info.dtype.itemsize
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_of_every_family_takes_what_the_abstract_model_says(case):
    config = read_config({**case.config, "torch_dtype": "float32", "dtype": "float32"})
    mesh, layout = MESHES[sum(map(ord, case.name)) % len(MESHES)]
    placement = dict(layout=parse_layout(layout))
    mine = by_path(DeviceMemory(config, MeshPlacement(mesh=planned(mesh), **placement)))
    assert mine == of_abstract_model(config, MeshPlacement(mesh=mesh_of(mesh), **placement))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", ["qwen2_moe_shared", "deepseek_v3_groups"])
def test_every_layout_splits_them_alike(name, layout):
    config = read_config({**CASES_BY_NAME[name].config, "torch_dtype": "float32", "dtype": "float32"})
    for mesh in ("data=2,expert=2,tensor=2", "pipeline=2,expert=2,tensor=2"):
        held = DeviceMemory(config, MeshPlacement(mesh=planned(mesh), layout=LAYOUTS[layout]))
        assert by_path(held) == of_abstract_model(config, MeshPlacement(mesh=mesh_of(mesh), layout=LAYOUTS[layout]))


@pytest.mark.parametrize("weights_dtype", ["int8", "fp8", "int8-block", "fp8-block"])
@pytest.mark.parametrize("name", ["mixtral_six_experts", "llama4_text_maverick"])
def test_quantized_ones_with_their_scales(name, weights_dtype):
    config = with_weights_dtype(
        read_config({**CASES_BY_NAME[name].config, "torch_dtype": "float32", "dtype": "float32"}), weights_dtype
    )
    mesh = "expert=2,tensor=4"
    mine = by_path(DeviceMemory(config, MeshPlacement(mesh=planned(mesh))))
    assert mine == of_abstract_model(config, MeshPlacement(mesh=mesh_of(mesh)))


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["qwen3_moe_norm", "deepseek_v2_lite", "gpt_oss_window"])
@pytest.mark.parametrize(("mesh", "layout"), [("data=2,tensor=4", "ep-tp"), ("data=4,tensor=2", "cp-ep-tp")])
def test_pages_take_what_the_engine_makes_of_them(mesh, layout, name, kv_dtype):
    config = read_config({**CASES_BY_NAME[name].config, "torch_dtype": "float32", "dtype": "float32"})
    placement = MeshPlacement(mesh=mesh_of(mesh), layout=parse_layout(layout))
    kernels = choose_kernels("float32", {}, platform="cpu", shared_pages=placement.num_shards("page_token") > 1)
    kept = {"fp8": "float8_e4m3fn"}.get(kv_dtype or "", kv_dtype)
    runner = abstract_runner(config, placement, dtype="float32", kv_dtype=kept, kernels=kernels)
    weights, pages = held_bytes(runner, max_num_seqs=8, context=64, page_size=16, chunk_tokens=512)
    held = DeviceMemory(config, MeshPlacement(mesh=planned(mesh), layout=parse_layout(layout)), kv_dtype=kv_dtype)
    assert held.weight_bytes == weights
    tokens = 8 // placement.num_shards("batch") * 64
    assert held.kv_bytes_per_token * tokens == pages
    assert held.kv_bytes_per_token * placement.num_shards("page_token") == runner.device_bytes_per_token


def test_padding_and_copies_are_what_an_even_share_lacks():
    config = read_config({**CASES_BY_NAME["mixtral_six_experts"].config, "torch_dtype": "float32", "dtype": "float32"})
    alone = DeviceMemory(config, MeshPlacement(mesh=planned("data=1")))
    assert alone.unpadded_bytes == alone.weight_bytes
    copies = DeviceMemory(config, MeshPlacement(mesh=planned("data=8")))
    assert copies.unpadded_bytes == alone.weight_bytes / 8
    assert copies.weight_bytes == alone.weight_bytes

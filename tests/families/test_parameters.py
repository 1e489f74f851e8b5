"""Declarations are all that a model consists of, and a checkpoint's tensors fill all of them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from flax import nnx

from jaxmoe.families import FAMILIES, read_config, weight_slices
from jaxmoe.families.parameters import block_parameters, checkpoint_parameters, outer_parameters
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes, segment_sizes
from jaxmoe.parallel.stages import layer_segments
from jaxmoe.weights.params import parameter_table

from ..conftest import ONE_DEVICE, mesh_of
from ..tiny.cases import CASES, CASES_BY_NAME

EIGHT_DEVICES = "expert=4,tensor=2"


def declared(config, placement: MeshPlacement) -> dict[str, tuple[object, ...]]:
    """Shape, logical dims, dtype and part of every declared parameter, by its path in the model."""
    segments = layer_segments(config, "scan")
    rows = {
        one.path: (tuple(one.dims.values()), tuple(one.dims), one.dtype, one.part)
        for one in outer_parameters(config, array_sizes(config, placement))
    }
    maps_experts = placement.redundant_experts is not None
    for number, (segment, sizes) in enumerate(zip(segments, segment_sizes(config, placement, segments), strict=True)):
        for block in range(segment.period):
            for one in block_parameters(config, sizes, segment.first + block, maps_experts=maps_experts):
                shape = (segment.slots, *one.dims.values())
                rows[f"segments/{number}/{block}/{one.path}"] = (shape, ("layer", *one.dims), one.dtype, one.part)
    return {path: (shape, dims, dtype or "bfloat16", part) for path, (shape, dims, dtype, part) in rows.items()}


@pytest.mark.parametrize("mesh", [ONE_DEVICE, EIGHT_DEVICES])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_consists_of_the_declared_parameters(case, mesh):
    config = read_config(case.config)
    redundant = 3 if config.moe is not None and mesh == EIGHT_DEVICES else None
    placement = MeshPlacement(mesh=mesh_of(mesh), redundant_experts=redundant)
    state = nnx.state(abstract_model(config, placement, dtype="bfloat16"))
    made = {
        info.path: (info.shape, info.dims, info.dtype.name, info.part) for info in parameter_table(state, placement)
    }
    assert made == declared(config, placement)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensors_fill_every_declared_parameter_once(case):
    """On one device a parameter has no padding: the slices of its tensors have as many numbers as it has."""
    config = read_config(case.config)
    placement = MeshPlacement(mesh=mesh_of(ONE_DEVICE))
    segments = layer_segments(config, "scan")
    sizes, filled = segment_sizes(config, placement, segments), Counter[str]()
    for one in weight_slices(config, sizes, FAMILIES[config.family].names, segments):
        filled[one.path] += math.prod(at.stop - at.start for at in one.dst if isinstance(at, slice))
    assert filled == {path: math.prod(shape) for path, (shape, *_) in declared(config, placement).items()}


def test_declarations_of_latent_attention():
    config = read_config(CASES_BY_NAME["deepseek_v3_groups"].config)
    mla, width = config.mla, config.hidden_size
    by_path = {one.path: one for one in checkpoint_parameters(config, 1)}
    latent = {path.removeprefix("attention/"): one for path, one in by_path.items() if path.startswith("attention/")}
    assert list(latent) == ["kv_down", "kv_norm", "q_down", "q_norm", "q", "key_up", "value_up", "out"]
    assert [path for path, one in latent.items() if one.quantizable] == ["kv_down", "q_down", "q", "out"]
    assert [path for path, one in latent.items() if one.part == "norms"] == ["kv_norm", "q_norm"]
    assert latent["q_down"].key == "{attention}.q_a_proj.weight"
    assert dict(latent["q_down"].dims) == {"width": width, "latent": mla.q_lora_rank}
    assert by_path["moe/selection_bias"].dtype == "float32"
    assert by_path["moe/experts/gate_up"].lead == 2

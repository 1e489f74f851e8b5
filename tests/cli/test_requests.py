"""Requests without weights hold the options of EngineConfig: none of their own, and no value that it refuses."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import ModuleType

import pytest
from jax.sharding import Mesh

from jaxmoe import CacheConfig, ConfigError, EngineConfig, KernelConfig
from jaxmoe.aot import fit
from jaxmoe.aot import request as aot_request
from jaxmoe.aot.fit import CompileRequest
from jaxmoe.aot.request import InspectRequest
from jaxmoe.config.engine import OPTION_FIELDS, RENAMED
from jaxmoe.errors import LayoutError, MeshError
from jaxmoe.map import data as map_data
from jaxmoe.map.data import MapRequest
from jaxmoe.parallel.layouts import LAYOUTS
from jaxmoe.planner import api as planner_api
from jaxmoe.planner.api import PlanRequest

from ..conftest import mesh_of

REQUESTS = [InspectRequest, CompileRequest, MapRequest, PlanRequest]
OWN = {
    InspectRequest: {"mesh": "data=1", "context": 8},
    CompileRequest: {"target": "v5p:2x2x1", "mesh": "tensor=4", "context": 8},
    MapRequest: {"mesh": "data=1", "context": 8},
    PlanRequest: {"hardware": "h100"},
}


def _requests_of(module: ModuleType) -> list[type]:
    found = [one for name, one in vars(module).items() if name.endswith("Request") and is_dataclass(one)]
    return [one for one in found if isinstance(one, type) and one.__module__ == module.__name__]


def test_no_request_declares_an_option_of_the_engine():
    declared = [one for module in (aot_request, fit, map_data, planner_api) for one in _requests_of(module)]
    assert set(declared) == set(REQUESTS)
    for one in declared:
        assert {field.name for field in fields(one)}.isdisjoint({*OPTION_FIELDS, *RENAMED, "dispatch"}), one


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("old", sorted(old for old, new in RENAMED.items() if new in OPTION_FIELDS))
def test_an_old_name_is_named_with_the_new_one(kind, old):
    with pytest.raises(ConfigError, match=f"{old} is now called {RENAMED[old]}"):
        kind.of("demo", **OWN[kind], **{old: 1})


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layuot": "tp"}, "there is no option layuot: did you mean layout"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a whole number of at least 1"),
        ({"chunk_tokens": 1.5}, "chunk_tokens=1.5 must be a whole number"),
        ({"kv_cache_gib": 2.0}, "kv_cache_gib.*leave it out"),
        ({"redundant_experts": 2}, "redundant_experts.*leave it out"),
    ],
)
def test_values_that_cannot_be_are_named(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        kind.of("demo", **OWN[kind], **options)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"mesh": None}, MeshError, "mesh=None must be text such as data=2,tensor=4"),
        ({"mesh": {"rows": 2}}, MeshError, "unknown mesh axis 'rows'"),
        ({"context": None}, ConfigError, "context=None must be a whole number"),
        ({"layout": 3}, LayoutError, "layout=3 must be one of ep-tp"),
        ({"kernels": {"gruoped": "blocks"}}, ConfigError, "kernels has unknown op 'gruoped'"),
        ({"kernels": "blocks"}, ConfigError, "kernels='blocks' must be a KernelConfig"),
        ({"revision": "main"}, Exception, "revision"),
    ],
)
def test_a_model_on_a_mesh_needs_these(options, kind, words):
    with pytest.raises(kind, match=words):
        InspectRequest.of("demo", **OWN[InspectRequest] | options).checked_model()


def test_options_replace_those_of_a_configuration():
    engine = EngineConfig(dtype="bf16", cache=CacheConfig(kv_dtype="int8", page_size=8), max_num_seqs=3)
    request = InspectRequest.of("demo", engine=engine, mesh="data=1", context=9, max_num_seqs=4)
    assert request.engine == engine.with_options({"mesh": "data=1", "context": 9, "max_num_seqs": 4})
    assert request.sizes == {"max_num_seqs": 4, "context": 9, "page_size": 8, "chunk_tokens": engine.chunk_tokens}
    with pytest.raises(ConfigError, match="must be an EngineConfig"):
        InspectRequest.of("demo", engine="tensor=2")


@pytest.mark.parametrize("mesh_type", [str, dict, Mesh])
@pytest.mark.parametrize("kernels", [None, {"dispatch": "all_gather"}, KernelConfig(dispatch="all_gather")])
@pytest.mark.parametrize("layout", ["tp-ep", LAYOUTS["tp-ep"]], ids=str)
def test_the_process_that_compiles_gets_the_same_request(mesh_type, kernels, layout):
    text, sizes = "expert=2,tensor=2", {"expert": 2, "tensor": 2}
    mesh = text if mesh_type is str else sizes if mesh_type is dict else mesh_of(text)
    options = {
        "dtype": "bf16",
        "kv_dtype": "int8",
        "ignore_config_keys": ["bos_token_id"],
        "page_size": 8,
        "decode_steps": 2,
    }
    request = CompileRequest.of(
        "demo", target="v5p:2x2x1", mesh=mesh, kernels=kernels, layout=layout, context=64, **options
    )
    again = CompileRequest.of(**json.loads(json.dumps(request.as_json())))
    assert again.checked() == request.checked()
    assert (again.kernels, again.sizes) == (request.kernels, request.sizes)
    same = {"mesh": None, "layout": "ep-tp", "kernels": None}
    assert again.engine.with_options(same) == request.engine.with_options(same)
    assert again.engine.parallel.layout == "tp-ep"


def test_a_plan_fixes_options_of_the_engine():
    request = PlanRequest.of(
        "demo", "h100", isl=16, mesh={"expert": 8}, dtype="bf16", layout=None, kernels={"dispatch": "all_gather"},
        ignore_config_keys=["a"],
    )  # fmt: skip
    assert request.fixed == {
        "mesh": {"expert": 8}, "dtype": "bfloat16", "kernels": {"dispatch": "all_gather"}, "ignore_config_keys": ("a",)
    }  # fmt: skip
    assert (request.isl, request.dispatch, request.ignored) == (16, "all_gather", ("a",))
    assert request.axes == {"data": 1, "pipeline": 1, "expert": 8, "tensor": 1}
    assert request == PlanRequest(model="demo", hardware="h100", isl=16, fixed=request.fixed)
    plain = PlanRequest.of("demo", "h100")
    assert (plain.axes, plain.dispatch, plain.ignored, plain.fixed) == (None, None, (), {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 64}, "a plan does not read context: leave it out; its options are mesh, layout"),
        ({"cache": CacheConfig(kv_dtype="int8")}, "a plan does not read cache"),
        ({"kernels": {"grouped": "blocks"}}, "must name the backend of dispatch alone"),
        ({"kernels": KernelConfig()}, "must name the backend of dispatch alone"),
    ],
)
def test_what_a_plan_cannot_fix_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PlanRequest.of("demo", "h100", **options)

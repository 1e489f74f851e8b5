"""What a step takes: bounds that hold whatever the constants are, and the traffic it is priced by."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxmoe.families import read_config, with_weights_dtype
from jaxmoe.parallel.collectives import StepShape, planned_collectives
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.cost import StepCost, imbalance
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.planner.links import group_of
from jaxmoe.planner.memory import DeviceMemory
from jaxmoe.planner.serving import RequestWorkload, ServingModel
from jaxmoe.planner.step_time import StepBatch
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config


def config_of(name: str, weights_dtype: str | None = None):
    return with_weights_dtype(read_config(read_json(find_config(name))), weights_dtype)


def cost_of(name: str, mesh: str, *, layout: str = "ep-tp", hardware: str = "h100", dispatch: str = "all_to_all"):
    placement = MeshPlacement(mesh=PlannedMesh(parse_mesh(mesh), "gpu"), layout=parse_layout(layout))
    return StepCost(DeviceMemory(config_of(name), placement), read_hardware(hardware), dispatch=dispatch)


def test_one_decoded_token_reads_the_weights_once():
    cost = cost_of("llama-3.1-8b", "data=1")
    seconds = cost.step_time(StepBatch(1, 0, 1))
    embedding = 128256 * 4096 * 2  # of which one row is read
    least = (cost.device_memory.weight_bytes - embedding) / cost.hardware.bytes_per_s
    assert least <= seconds.memory <= 1.02 * least
    assert seconds.link == seconds.scale_out == seconds.bubble == 0


def test_a_long_prompt_takes_its_products():
    cost = cost_of("llama-3.1-8b", "data=1")
    seconds = cost.step_time(StepBatch(0, 8192, 0, 4096))
    matmuls = 2 * 6.98e9 * 8192 / cost.hardware.flops_per_s("bf16")  # all matrices but embedding and head
    assert matmuls <= seconds.compute <= 1.4 * matmuls  # attention, and what outputs take


def test_half_as_wide_numbers_take_half_the_time_where_memory_binds():
    whole, half = (
        StepCost(
            DeviceMemory(
                config_of("llama-3.1-70b", dtype), MeshPlacement(mesh=PlannedMesh(parse_mesh("tensor=4"), "gpu"))
            ),
            read_hardware("h100"),
        ).step_time(StepBatch(1, 0, 1))
        for dtype in (None, "fp8")
    )
    assert half.memory / whole.memory == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("context", "wanted"), [(64, 64), (100_000, 128)])
def test_windows_bound_what_is_read_of_pages(context, wanted):
    cost = cost_of("gpt-oss-20b", "data=1")
    before, after = (cost.step_time(StepBatch(64, 0, tokens)).memory for tokens in (0, context))
    full, windowed = 12 * context, 12 * wanted  # every other layer has a window of 128
    pages = 64 * (full + windowed) * cost.device_memory.kv_bytes(cost.device_memory.blocks[0])
    assert after - before == pytest.approx(pages / cost.hardware.bytes_per_s, rel=0.05)


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "hierarchical"])
@pytest.mark.parametrize(
    ("mesh", "layout"), [("expert=4,tensor=4", "dp-ep"), ("pipeline=2,expert=2,tensor=4", "tp-ep")]
)
def test_collectives_are_those_planned(mesh, layout, dispatch):
    cost = cost_of("qwen3-30b-a3b", mesh, layout=layout, dispatch=dispatch)
    tokens, placement = 1024, cost.placement
    shape = StepShape(num_tokens=tokens, num_sampled=tokens, itemsize=2, picked=True)
    wanted = sum(
        count * cost.links.seconds(one, group_of(one.axes, placement.mesh.shape, 8))
        for one, count in planned_collectives(cost.config, placement, shape, dispatch=dispatch).items()
    )
    priced = cost.step_time(StepBatch(tokens * cost.num_stages, 0, 1))
    # for ranks that arrive later, at both exchanges of each layer, and a part of what a token's work takes there
    work = priced.compute + priced.memory + priced.launch
    waits = priced.link + priced.scale_out - wanted
    assert 0.9 * 2 * 48 * 10e-6 <= waits <= 2 * 48 * 10e-6 + 0.5 * work


@pytest.mark.parametrize("dispatch", ["all_to_all", "ragged_all_to_all", "hierarchical_ragged"])
def test_each_collective_is_priced_once(dispatch):
    """Those that a dispatch sends ahead, too, which do not grow with tokens."""
    cost = cost_of("qwen3-30b-a3b", "expert=2,tensor=4", layout="dp-ep", dispatch=dispatch)
    shape = StepShape(num_tokens=1024, num_sampled=1024, itemsize=2, picked=True)
    planned = planned_collectives(cost.config, cost.placement, shape, dispatch=dispatch)
    priced: Counter[str] = Counter()
    for one, _, count, _ in cost._planned:
        priced[one.op] += count
    wanted: Counter[str] = Counter()
    for one, count in planned.items():
        wanted[one.op] += count
    assert priced == wanted


def test_stages_wait_less_with_more_chunks():
    one, two = (
        StepCost(
            DeviceMemory(
                config_of("llama-3.1-70b"),
                MeshPlacement(mesh=PlannedMesh(parse_mesh("pipeline=4,tensor=2"), "gpu"), virtual_stages=v),
            ),
            read_hardware("h100"),
        ).step_time(StepBatch(64, 2048, 1024, 512))
        for v in (1, 2)
    )
    assert one.bubble == pytest.approx(2 * two.bubble, rel=0.01)
    assert one.bubble / (one.total - one.bubble) == pytest.approx(3 / 16)  # (P - 1) / M, M = 4 P


@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (256, 64), (8, 8), (128, 16)])
def test_imbalance_grows_with_skew_and_is_none_where_loads_are_even(experts, ranks):
    assert imbalance(experts, ranks, 0.0) == imbalance(experts, 1, 1.0) == 1
    found = [imbalance(experts, ranks, skew) for skew in (0.2, 0.5, 1.0)]
    assert 1 < found[0] < found[1] < found[2] <= ranks


def test_pages_fill_what_weights_leave():
    cost = cost_of("llama-3.1-8b", "data=1")
    serving = ServingModel(cost, chunk_tokens=2048)
    room = cost.hardware.hbm_bytes - cost.device_memory.weight_bytes
    taken = serving.pool_tokens() * cost.device_memory.kv_bytes_per_token
    assert 0.8 * room < taken < room
    load = RequestWorkload(isl=1000, osl=1000)
    assert serving.max_requests(load) == math.floor(serving.pool_tokens(512) / 2000) or serving.max_requests(load) > 0


def test_where_every_layer_has_a_window_a_request_holds_a_window_and_a_chunk():
    cost, load = cost_of("llama-3.1-8b", "data=1"), RequestWorkload(isl=16000, osl=16000)
    windowed = replace(cost.device_memory.config, sliding_windows=(4096,) * 32)
    half = replace(windowed, sliding_windows=(4096, None) * 16)
    found = [
        ServingModel(
            StepCost(DeviceMemory(config, cost.placement), cost.hardware, dispatch="all_to_all"), chunk_tokens=512
        )
        for config in (cost.device_memory.config, half, windowed)
    ]
    whole, mixed, freed = (serving.max_requests(load) for serving in found)
    assert whole == mixed
    assert freed == pytest.approx(whole * 32000 / (4096 + 512), rel=0.05)
    short = RequestWorkload(isl=100, osl=100)
    assert found[0].max_requests(short) == found[2].max_requests(short)


def test_more_requests_serve_more_tokens_and_each_slower():
    serving = ServingModel(cost_of("llama-3.1-70b", "tensor=8"), chunk_tokens=2048)
    found = [serving.estimate(RequestWorkload(isl=1000, osl=1000), count) for count in (1, 8, 64, 512)]
    assert all(a.tokens_per_s < b.tokens_per_s and a.tpot < b.tpot for a, b in pairwise(found))
    for one in found:
        assert one.tpot <= 1.001 * one.mean_step.total  # which has its own prompt's steps in it
        assert one.tokens_per_s * one.mean_step.total == pytest.approx(one.concurrency)


def test_a_request_alone_waits_for_its_prompt_once():
    serving = ServingModel(cost_of("llama-3.1-8b", "data=1"), chunk_tokens=2048)
    short, long = (serving.estimate(RequestWorkload(isl=8000, osl=osl), 1) for osl in (10, 1000))
    alone = serving.cost.step_time(StepBatch(1, 0, 8005)).total
    assert short.tpot == pytest.approx(alone, rel=0.2)
    assert short.ttft == pytest.approx(long.ttft, rel=0.05)


def test_a_pipeline_of_one_request_is_no_faster_than_reading_its_weights():
    cost = cost_of("mixtral-8x22b", "pipeline=8", hardware="b200")
    active = 39.15e9 * 2 / 8e12  # published active parameters, at the rate on paper
    assert cost.step_time(StepBatch(1, 0, 16)).total > active


def test_replicas_serve_as_many_times_more():
    load = RequestWorkload(isl=1000, osl=1000)
    one, four = (ServingModel(cost_of("llama-3.1-8b", mesh), chunk_tokens=2048) for mesh in ("data=1", "data=4"))
    assert four.max_requests(load) == 4 * one.max_requests(load)
    single, many = one.estimate(load, 16), four.estimate(load, 64)
    assert many.tokens_per_s == pytest.approx(4 * single.tokens_per_s)
    assert replace(many, concurrency=16, tokens_per_s=single.tokens_per_s) == single


def test_a_step_needs_room_by_what_it_is_for():
    alone, spread = (cost_of("qwen3-30b-a3b", mesh).device_memory for mesh in ("data=1", "expert=8"))
    assert set(alone.step_parts(1000, 10)) == {"activations", "logits"}
    parts = spread.step_parts(1000, 10)
    assert parts["dispatch_buffers"] == 2 * 8 * 1000 * 2048 * 2  # there and back, to each rank, in two bytes a number
    assert sum(parts.values()) == spread.step_bytes(1000, 10)

"""Plans: what the field advises comes out of the prices; a front is a front; what cannot be is said with numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.parallel.layouts import LAYOUTS, parse_layout
from jaxmoe.parallel.mesh import check_axes
from jaxmoe.planner.links import group_of
from jaxmoe.planner.search import NoPlanError, search
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.specs import candidates_of, kind_of
from jaxmoe.planner.why import NeighborPlans, reasons
from scripts.planner_validation import predict, read_rows, score
from scripts.score_planner import config_of

from .plans import LOAD, found, question

PUBLISHED = Path(__file__).parent / "data" / "published_sample.csv"


def kind(model: str, *rest) -> str:
    asked = question(model, *rest)
    return kind_of(found(model, *rest).best.parallelism, moe=asked.config.moe is not None)


def test_a_small_model_is_replicated_for_throughput_and_split_for_latency():
    assert kind("llama-3.1-8b", "h100", 8) == "DP8"
    assert kind("llama-3.1-8b", "h100", 8, "latency") == "TP8"


def test_a_dense_model_over_two_nodes_is_split_inside_and_staged_between():
    assert kind("llama-3.1-405b", "h100", 16, "latency") == "TP8 PP2"


def test_experts_lie_over_all_of_two_nodes_where_one_is_too_small():
    assert "EP16" in kind("deepseek-v3", "h100", 16)
    best = found("deepseek-v3", "h100", 16).best
    exchanged = tuple(axis for axis in best.parallelism.layout.experts if axis in best.parallelism.layout.batch)
    assert group_of(exchanged, dict(best.parallelism.axes), 8).across == 2


def test_a_model_that_fits_one_node_stays_there():
    assert "EP8" in kind("deepseek-v3.1", "b200", 8)
    best = found("deepseek-v3.1", "b200", 16).best
    assert dict(best.parallelism.axes)["data"] == 2
    assert best.estimate.mean_step.scale_out == 0
    said = " ".join(reasons(question("deepseek-v3.1", "b200", 16), found("deepseek-v3.1", "b200", 16), None,
                            NeighborPlans(half=None, twice=None)))  # fmt: skip
    assert "multi-node parallelism is not needed yet" in said


def test_the_front_trades_tokens_a_second_for_time_a_token():
    for one in (found("deepseek-v3.1", "b200", 8), found("llama-3.1-405b", "h100", 16, "latency")):
        assert len(one.front) > 3
        assert one.best in one.front
        for fast, full in pairwise(one.front):
            assert fast.estimate.tpot < full.estimate.tpot
            assert fast.tokens_per_s < full.tokens_per_s


def test_no_plan_found_is_better_than_the_best_by_more_than_prices_are_exact():
    for objective in ("throughput", "latency"):
        one = found("llama-3.1-8b", "h100", 8, objective)
        values = [
            plan.request_seconds if objective == "latency" else 1 / plan.tokens_per_s for plan in one.every
        ]  # fmt: skip
        mine = one.best.request_seconds if objective == "latency" else 1 / one.best.tokens_per_s
        assert mine <= 1.03 * min(values)


@pytest.mark.parametrize("devices", [1, 6, 8, 12])
def test_specs_use_all_devices_and_mean_something_else_each(devices):
    specs = list(candidates_of(question("qwen3-30b-a3b", "h100", devices)))
    assert specs
    assert all(math.prod(size for _, size in spec.axes) == devices for spec in specs)
    assert len(set(specs)) == len(specs)
    if devices == 8:
        kinds = {kind_of(spec, moe=True) for spec in specs}
        assert {"TP8", "DP8", "EP8", "TP8 EP8", "PP8"} <= kinds
        assert {spec.dispatch for spec in specs} >= {"all_to_all", "all_gather", "ragged_all_to_all", "hierarchical"}
        assert {spec.virtual_stages for spec in specs} == {1, 2}


def test_what_is_asked_for_is_kept():
    asked = replace(
        question("qwen3-30b-a3b", "h100", 8), axes=check_axes({"pipeline": 2, "expert": 4}),
        layout=parse_layout("dp-ep"), dispatch="all_gather", virtual_stages=2, chunk_tokens=1024,
    )  # fmt: skip
    spec = search(asked).best.parallelism
    assert (spec.mesh, spec.layout, spec.dispatch) == ("pipeline=2,expert=4", LAYOUTS["dp-ep"], "all_gather")
    assert (spec.virtual_stages, spec.chunk_tokens) == (2, 1024)


def test_requests_that_nobody_named_are_halved_where_they_have_no_room():
    """A H100 has room for three requests so long beside Llama-3.1-8B; four are assumed for the lowest latency."""
    asked = replace(question("llama-3.1-8b", "h100", 1, "latency"), workload=RequestWorkload(isl=120_000, osl=1000))
    best = search(asked).best
    assert (best.estimate.concurrency, best.max_requests) == (2, 3)
    with pytest.raises(NoPlanError, match="no room for 4 requests"):
        search(replace(asked, workload=RequestWorkload(isl=120_000, osl=1000, concurrency=4)))


@pytest.mark.parametrize("case", [("llama-3.1-8b", "h100", 1), ("llama-3.1-8b", "v5e", 4), ("gpt-oss-120b", "h100", 2)])
def test_as_many_requests_as_are_said_to_have_room_are_planned_for(case):
    """By the smallest chunks of prompts where others leave too little; served nearly as well as those that are best."""
    best = found(*case).best
    full = search(replace(question(*case), workload=replace(LOAD, concurrency=best.max_requests))).best
    assert full.estimate.concurrency == best.max_requests
    assert full.tokens_per_s > 0.9 * best.tokens_per_s
    with pytest.raises(NoPlanError, match="no room for") as caught:
        search(replace(question(*case), workload=replace(LOAD, concurrency=1 << 24)))
    most = replace(LOAD, concurrency=caught.value.most)  # of any split
    assert search(replace(question(*case), workload=most)).best.estimate.concurrency >= best.max_requests
    with pytest.raises(NoPlanError, match="no room for"):
        search(replace(question(*case), workload=replace(LOAD, concurrency=caught.value.most + 1)))


@pytest.mark.parametrize("load", [(4096, 1), (512, 2), (128, 8), (8192, 2), (8192, 16), (1024, 1024)])
@pytest.mark.parametrize("count", [1, 7, 48])
def test_times_agree_with_tokens_a_second(load, count):
    """So many requests, always at once, each as long as its tokens take (Little's law)."""
    asked = RequestWorkload(isl=load[0], osl=load[1], concurrency=count)
    served = search(replace(question("llama-3.1-70b", "h100", 8), workload=asked)).best.estimate
    assert count * served.osl / served.request_seconds == pytest.approx(served.tokens_per_s)
    assert served.mean_step.total * served.num_steps == pytest.approx(served.request_seconds)
    assert served.ttft > 0
    assert (served.tpot == 0) == (served.osl == 1)
    assert served.seconds_per_token == (served.tpot or served.ttft)


def test_the_front_of_single_tokens_trades_their_time():
    one = search(replace(question("llama-3.1-8b", "h100", 8), workload=RequestWorkload(isl=1024, osl=1)))
    assert len(one.front) > 3
    for fast, full in pairwise(one.front):
        assert fast.estimate.ttft < full.estimate.ttft
        assert fast.tokens_per_s < full.tokens_per_s


def test_limits_beside_latency_keep_the_requests_assumed_while_they_are_kept():
    asked = question("llama-3.1-8b", "h100", 8, "latency")
    fastest = {
        count: min(
            plan.estimate.tpot for plan in search(replace(asked, workload=replace(LOAD, concurrency=count))).every
        )
        for count in (32, 16)
    }
    for limit, requests in ((None, 32), (1.01 * fastest[32], 32), (0.99 * fastest[32], 16), (0.99 * fastest[16], 8)):
        one = search(replace(asked, tpot_limit=limit))
        assert one.best.estimate.concurrency == requests
        assert limit is None or one.best.estimate.tpot <= limit
        assert {plan.estimate.concurrency for plan in one.every} == {requests}


def test_requests_are_as_many_as_a_limit_lets_in():
    """Not a power of two of them: some more would be too many."""
    asked = replace(question("llama-3.1-8b", "h100", 1), axes=check_axes({}))
    limit = 1.7 * search(replace(asked, workload=replace(LOAD, concurrency=1))).best.estimate.tpot
    best = search(replace(asked, tpot_limit=limit)).best
    more = best.serving.estimate(LOAD, round(1.1 * best.estimate.concurrency))
    assert best.estimate.tpot <= limit < more.tpot


@pytest.mark.parametrize(("hardware", "devices"), [("a100", 1), ("h100", 8)])
def test_fewer_requests_are_taken_where_more_serve_no_more(hardware, devices):
    one = search(question("llama-3.1-8b", hardware, devices))
    most = max(plan.tokens_per_s for plan in one.every)
    assert one.best.tokens_per_s >= most / 1.03
    for count in (1 << power for power in range(one.best.max_requests.bit_length() - 1)):
        served = one.best.serving.estimate(LOAD, count)
        if served.tokens_per_s >= most / 1.03:
            assert one.best.request_seconds <= 1.03 * (served.ttft + (LOAD.osl - 1) * served.tpot)


def test_chunks_of_stages_and_dispatches_asked_for_are_looked_at_where_they_mean_something():
    asked = question("qwen3-30b-a3b", "h100", 8)
    assert all(dict(spec.axes)["pipeline"] > 1 for spec in candidates_of(replace(asked, virtual_stages=2)))
    for dispatch in ("hierarchical", "all_gather"):
        layouts = [spec.layout for spec in candidates_of(replace(asked, dispatch=dispatch))]
        assert layouts
        assert all(layout.experts for layout in layouts)
    with pytest.raises(NoPlanError, match="virtual_stages=2 needs stages: no mesh of 1 device has any"):
        search(replace(asked, devices=1, virtual_stages=2))


def test_a_pipeline_that_cannot_be_cut_says_why():
    asked = replace(question("llama-3.1-8b", "h100", 64), axes=check_axes({"pipeline": 64}))
    with pytest.raises(ConfigError, match="pipeline=64 needs at least 64 identical consecutive layers"):
        search(asked)


def test_a_model_too_large_is_told_by_its_bytes():
    with pytest.raises(
        NoPlanError, match=r"8 x h100: the weights take at least 9\d\.\d GiB of every device, .* 79\.1 GiB"
    ):
        search(question("llama-3.1-405b", "h100", 8))


def test_limits_of_latency_bound_the_plan_or_name_the_best_possible():
    asked = question("llama-3.1-70b", "h100", 8)
    limited = search(replace(asked, tpot_limit=0.02))
    assert limited.best.estimate.tpot <= 0.02 < search(asked).best.estimate.tpot
    with pytest.raises(NoPlanError, match=r"--sla-tpot-ms 0\.1 cannot be met by 8 x h100: .* lowest TPOT is \d"):
        search(replace(asked, tpot_limit=0.0001))


def test_published_measurements_are_met_without_a_constant_of_any_model():
    rows = [predict(facts, config_of) for facts in read_rows(PUBLISHED)]
    planner, light = score(rows), score(rows, of=lambda row: row.speed_of_light)
    assert planner.rows == 55
    assert planner.mape < 0.15
    assert planner.rank > 0.97
    assert planner.regret is not None
    assert planner.regret < 0.05
    assert light.mape > 1
    assert light.rank < planner.rank

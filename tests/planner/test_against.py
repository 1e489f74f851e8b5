"""Published measurements: how a row is read and placed, and that predictions agree with them. No clock is asked."""

from __future__ import annotations

import math

import pytest

from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import check_axes
from jaxmoe.planner.hardware import hardware_names
from scripts.planner_validation import _hardware_name, _load, held_out, placed, predict, read_rows, score
from scripts.score_planner import LOADS, MORE, SAMPLE, config_of


@pytest.mark.parametrize("path", [MORE, LOADS])
def test_a_part_of_all_rows_is_met(path):
    facts = read_rows(path)[::9]
    rows = [predict(one, config_of) for one in facts]
    planner, light = score(rows), score(rows, of=lambda row: row.speed_of_light)
    assert planner.rows == len(facts) > 35
    assert planner.mape < 0.35
    assert planner.rank > 0.9
    assert light.mape > 3 * planner.mape


def test_every_row_names_its_source_and_whole_models_and_machines_are_held_out():
    rows = [facts for path in (SAMPLE, MORE, LOADS) for facts in read_rows(path)]
    assert all("@" in facts["source"] or facts["source"].startswith("https://") for facts in rows)
    assert all(float(facts["value"]) > 0 for facts in rows)
    more = read_rows(MORE)
    held, rest = ([facts for facts in more if held_out(facts) == which] for which in (True, False))
    assert min(len(held), len(rest)) > 200
    apart = {facts["model"] for facts in held} - {facts["model"] for facts in rest}
    assert {"Llama-3.1-405B", "gpt-oss-120b", "Qwen3-30B-A3B", "Mixtral-8x22B", "Kimi-K2-Instruct"} <= apart
    assert {"GB200", "A100"} == {facts["hardware"] for facts in held} - {facts["hardware"] for facts in rest}
    assert not any(held_out(facts) for facts in read_rows(SAMPLE))


@pytest.mark.parametrize(
    ("parallelism", "devices", "axes", "layout"),
    [
        ("TP8", 8, {"tensor": 8}, "ep-tp"),
        ("TP2 PP2", 8, {"data": 2, "pipeline": 2, "tensor": 2}, "ep-tp"),
        ("TEP8 (TP8 attention + EP8)", 8, {"tensor": 8}, "tp-ep"),
        ("DEP8 (attn DP8+EP8)", 8, {"expert": 8}, "ep-tp"),
        ("DEP32 (DP32 attention + EP32)", 32, {"expert": 4, "tensor": 8}, "dp-ep"),
        ("TP8 EP4 (moe TP2)", 8, {"expert": 4, "tensor": 2},
         "batch=data,split=expert+tensor,experts=expert,expert_width=tensor"),
        ("TP2 + attention_dp (ep 1)", 4, {"data": 2, "expert": 2}, "ep-tp"),
    ],
)  # fmt: skip
def test_splits_are_placed_as_the_field_words_them(parallelism, devices, axes, layout):
    found, named = placed(parallelism, devices, moe=True)
    assert found is not None
    assert named == layout
    assert {axis: size for axis, size in found.items() if size > 1} == axes
    assert math.prod(check_axes(found).values()) == devices
    parse_layout(named)


def test_a_split_that_is_not_said_is_searched():
    assert placed("disaggregated", 40, moe=True) == (None, None)


def test_hardware_is_named_by_words():
    for name in hardware_names():
        assert _hardware_name(f"8 x NVIDIA {name.upper()} SXM") == name
    assert _hardware_name("GH200") == "gh200"  # no preset, and no H200


def test_requests_are_those_measured():
    facts = read_rows(MORE)[0] | {"isl": "1024", "osl": "512", "batch_or_concurrency": "concurrency 64"}
    load = _load(facts | {"system": "a server"})
    assert (load.isl, load.osl, load.concurrency) == (1024, 512, 64)
    drawn = _load(facts | {"system": "a server; lengths drawn from 80-100% of isl and osl"})
    assert (drawn.isl, drawn.osl) == (922, 461)
    assert _load(facts | {"batch_or_concurrency": "max load"}).concurrency is None


def _row(**changed: str) -> dict[str, str]:
    facts = {
        "system": "a server", "model": "Llama-3.1-8B", "hardware": "H100", "num_gpus": "1", "parallelism": "TP1",
        "precision": "fp8", "phase": "e2e", "isl": "1024", "osl": "1024", "batch_or_concurrency": "concurrency 64",
        "metric": "total_output_throughput", "value": "5000", "unit": "tokens/s", "source": "none",
    }  # fmt: skip
    return facts | changed


def test_more_requests_than_have_room_wait():
    some, many = (predict(_row(batch_or_concurrency=f"concurrency {n}"), config_of) for n in (16, 100_000))
    assert many.predicted > some.predicted


def test_a_benchmark_of_few_requests_is_slower_than_one_that_goes_on():
    going, ending = (predict(_row(system=name, isl="128", osl="128", batch_or_concurrency="max load"), config_of)
                     for name in ("a server", "trtllm-bench max load"))  # fmt: skip
    assert 0.8 * going.predicted < ending.predicted <= going.predicted


def test_where_prompts_are_read_elsewhere_tokens_come_faster():
    whole, alone = (predict(_row(phase=phase), config_of) for phase in ("e2e", "decode"))
    assert alone.predicted > whole.predicted


def test_loads_of_other_concurrency_are_other_groups():
    rows = [
        predict(_row(batch_or_concurrency=f"concurrency {n}", value=str(value)), config_of)
        for n, value in ((16, 2000), (64, 6000))
    ]
    assert score(rows).regret is None
    assert score([rows[0], rows[0]]).regret == 0

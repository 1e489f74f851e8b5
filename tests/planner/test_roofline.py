"""The roofline of a plan: points under both roofs, at intensities that follow from the shapes."""

from __future__ import annotations

import pytest

from jaxmoe.planner.roofline import op_costs, roofline
from jaxmoe.planner.search import search
from jaxmoe.planner.step_time import StepBatch

from .plans import LOAD, found, question


@pytest.mark.parametrize("case", [("deepseek-v3", "h100", 16), ("llama-3.1-8b", "h100", 8), ("gpt-oss-20b", "h200", 8)])
def test_points_lie_under_both_roofs(case):
    best = found(*case).best
    drawn = roofline(best.serving, LOAD, concurrency=best.estimate.concurrency)
    assert {one["phase"] for one in drawn["points"]} == {"prefill", "decode"}
    for one in drawn["points"]:
        assert one["flops_per_s"] <= 1.0001 * one["flops_per_byte"] * drawn["bytes_per_s"]
        assert one["flops_per_s"] <= max(drawn["flops_per_s"].values())
    assert drawn["bytes_per_s"] < drawn["on_paper"]["bytes_per_s"]
    kinds = {one["op"] for one in drawn["points"]}
    assert {"attention", "attention over tokens"} < kinds
    assert ("experts" in kinds) == (question(*case).config.moe is not None)


def test_intensity_follows_from_tokens():
    """Of one decoded token a weight of 2 bytes takes one multiplication and one addition."""
    cost = search(question("llama-3.1-8b", "h100", 1)).best.serving.cost
    one, many = ({work.kind: work for work in op_costs(cost, StepBatch(rows, 0, 1024))} for rows in (1, 64))
    assert one["dense_mlp"].intensity == pytest.approx(1, rel=0.01)
    assert many["dense_mlp"].intensity == pytest.approx(64, rel=0.1)
    assert many["dense_mlp"].flops == 64 * 2 * 3 * 4096 * 14336
    # Eight heads' keys and values serve 32 heads' queries, four each; of 2 bytes a number.
    assert one["attention over tokens"].intensity == many["attention over tokens"].intensity == pytest.approx(4)


def test_experts_meet_the_tokens_that_choose_them():
    cost = search(question("qwen3-30b-a3b", "h100", 1)).best.serving.cost
    work = {work.kind: work for work in op_costs(cost, StepBatch(256, 0, 1024))}
    assert work["experts"].flops == 256 * 8 * 2 * 3 * 2048 * 768
    assert work["experts"].intensity == pytest.approx(256 * 8 / 128, rel=0.2)  # a mean expert's tokens

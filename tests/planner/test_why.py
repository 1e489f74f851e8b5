"""Reasons: every sentence agrees with the numbers it is made of, and no remedy is so already."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from jaxmoe.families import read_config, with_weights_dtype
from jaxmoe.parallel.mesh import check_axes
from jaxmoe.planner.choose import REL_TOLERANCE, objective_value
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.planner.improvements import improvements
from jaxmoe.planner.search import search
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.specs import kind_of
from jaxmoe.planner.why import NeighborPlans, counted, digits, reasons
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config

from .plans import found, question

ALONE = NeighborPlans(half=None, twice=None)
CASES = [
    ("llama-3.1-405b", "h100", 16, "latency"), ("deepseek-v3", "h100", 16), ("deepseek-v3", "h200", 64),
    ("qwen3-30b-a3b", "v5e", 16), ("llama-3.1-8b", "h100", 8),
]  # fmt: skip


def said(case, neighbors: NeighborPlans = ALONE) -> list[str]:
    return reasons(question(*case), found(*case), None, neighbors)


def test_reasons_hold_numbers_and_what_binds():
    case = CASES[0]
    lines = said(case, NeighborPlans(half=None, twice=found(*case).best))
    assert lines[0].startswith("Bottleneck: reading weights and KV cache from memory")
    assert any(line.startswith("No tensor parallelism across nodes") and "TP16" in line for line in lines)
    assert any(line.startswith("Pipeline stages span nodes") for line in lines)
    assert any(line.startswith("Twice the devices") for line in lines)
    assert all(any(letter.isdigit() for letter in line) for line in lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_what_is_as_good_is_said_to_be_and_what_loses_loses(case):
    asked, one = question(*case), found(*case)
    best = objective_value(asked, one.best)
    for line in said(case):
        if not (match := re.match(r"Alternative (.+?) \((\S+), ", line)):
            continue
        plan = next(plan for plan in sorted(one.every, key=lambda plan: objective_value(asked, plan))
                    if kind_of(plan.parallelism, moe=asked.config.moe is not None) == match[1])  # fmt: skip
        assert plan.parallelism.mesh == match[2]
        assert ("as good on paper" in line) == (objective_value(asked, plan) <= (1 + REL_TOLERANCE) * best)
        if "as good" not in line:
            theirs, here = (float(number) for number in re.findall(r"([\d.]+) (?:ms of|us for|in this plan)", line))
            assert theirs >= here
            same = plan.estimate.concurrency == one.best.estimate.concurrency
            assert ("of a step" in line) == same


def test_experts_over_fewer_nodes_than_there_are_say_so():
    asked = question("deepseek-v3", "h100", 32)
    fixed = replace(asked, axes=check_axes({"data": 2, "expert": 16}))
    one = search(fixed)
    across = next(line for line in reasons(fixed, one, None, ALONE) if line.startswith("Experts are sharded"))
    assert "over 2 of 4 nodes, so" in across
    assert "the rest hold replicas of them" in across
    both = next(line for line in said(("deepseek-v3", "h100", 16)) if line.startswith("Experts are sharded"))
    assert "over both nodes, so" in both


def test_slices_are_no_nodes():
    lines = said(("llama-3.1-8b", "v5e", 512))
    assert any("multi-slice" in line for line in lines)
    assert not any("node" in line for line in lines)


def binds(model: str, hardware: str, part: str, weights_dtype: str | None = None, **changes) -> str:
    config = with_weights_dtype(read_config(read_json(find_config(model))), weights_dtype)
    asked = replace(question("llama-3.1-8b", "h100", 8), config=config, hardware=read_hardware(hardware), **changes)
    return ", ".join(improvements(asked, search(asked).best, part, more_devices=False))


def test_remedies_differ_from_what_is():
    assert "--weights-dtype fp8" in binds("llama-3.1-8b", "h100", "compute")
    assert "--weights-dtype" not in binds("llama-3.1-8b", "h100", "compute", "fp8")
    assert "--weights-dtype int8" in binds("llama-3.1-8b", "a100", "compute")
    assert "--weights-dtype" not in binds("deepseek-v3", "b200", "compute")
    assert "--kv-dtype fp8" in binds("llama-3.1-8b", "h100", "memory")
    assert "--kv-dtype" not in binds("llama-3.1-8b", "h100", "memory", kv_dtype="int8")
    few = RequestWorkload(isl=1024, osl=1024, concurrency=8)
    assert "--max-num-seqs, up to" in binds("llama-3.1-8b", "h100", "memory", workload=few)
    assert "requests" not in binds("llama-3.1-8b", "h100", "memory")  # as many as are best
    assert "requests" not in binds("llama-3.1-8b", "h100", "memory", workload=few, objective="latency")
    assert "looser latency limits" in binds("llama-3.1-8b", "h100", "launch", tpot_limit=0.01)
    assert binds("llama-3.1-8b", "h100", "scale_out").endswith(", faster links between nodes than 50 GB/s per device")
    assert "omit --mesh" in binds("llama-3.1-8b", "h100", "link", axes=check_axes({"tensor": 8}))


def test_every_remedy_gains_what_it_says():
    """Of gpt-oss-120b on two H100 products bind, and pages in fp8 gain a third."""
    asked, best = question("gpt-oss-120b", "h100", 2), found("gpt-oss-120b", "h100", 2).best
    (said,) = improvements(asked, best, "compute", more_devices=False)
    gain = search(replace(asked, kv_dtype="fp8")).best.tokens_per_s / best.tokens_per_s - 1
    assert said == f"quantized KV cache (--kv-dtype fp8): {gain:.0%} more tokens/s"
    assert gain > 0.2


@pytest.mark.parametrize(
    ("model", "hardware", "devices", "changes", "left_out"),
    [
        ("llama-3.1-8b", "h100", 1, {"workload": RequestWorkload(isl=1024, osl=1024, concurrency=4)}, "--kv-dtype"),
        ("mixtral-8x7b", "h200", 8, {"objective": "latency"}, "--kv-dtype"),
        (
            "llama-3.1-8b",
            "v4",
            1,
            {"workload": RequestWorkload(isl=4096, osl=1), "kv_dtype": "int8"},
            "--weights-dtype",
        ),
    ],
)
def test_what_gains_no_more_than_prices_are_exact_is_left_out(model, hardware, devices, changes, left_out):
    asked = replace(question(model, hardware, devices), **changes)
    assert left_out not in " ".join(improvements(asked, search(asked).best, "memory", more_devices=False))


def test_small_numbers_keep_their_digits():
    assert [digits(one) for one in (0.0123, 1.234, 36.94, 100.4, 28920.2)] == [
        "0.0123",
        "1.23",
        "36.9",
        "100",
        "28,920",
    ]
    asked = question("demo", "h100", 8, "latency")
    asked = replace(asked, workload=RequestWorkload(isl=32, osl=16))
    lines = reasons(asked, search(asked), None, ALONE)
    assert any(line.startswith("Alternative") for line in lines)
    assert not any(" 0.00 " in line for line in lines)


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("model", "Half the devices, 8, cannot hold the model: one node is too small."),
        ("requests", "Half the devices, 8, hold the model but have no room for 64 requests: one node is too small."),
        ("limits", "Half the devices, 8, cannot meet the latency limits."),
    ],
)
def test_what_half_the_devices_lack_is_said(lacks, words):
    assert words in said(CASES[0], NeighborPlans(half=None, twice=None, half_unmet=lacks))


@pytest.mark.parametrize(("factor", "slower"), [(1.02, False), (1.05, True)])
def test_more_devices_are_slower_beyond_noise_alone(factor, slower):
    """The same plan on twice the devices, with every request so many times as long."""
    best = found(*CASES[0]).best
    axes = tuple((axis, size * (2 if axis == "data" else 1)) for axis, size in best.parallelism.axes)
    served = replace(best.estimate, ttft=factor * best.estimate.ttft, tpot=factor * best.estimate.tpot)
    twice = replace(best, parallelism=replace(best.parallelism, axes=axes), estimate=served)
    line = next(line for line in said(CASES[0], NeighborPlans(half=None, twice=twice)) if line.startswith("Twice"))
    assert ("more devices make it slower here" in line) == slower


def test_what_is_priced_as_something_else_is_said():
    asked = question("deepseek-v3.2", "b200", 8)
    lines = reasons(asked, search(asked), None, ALONE)
    assert any(line.startswith("Estimated as dense latent attention") and "2,048" in line for line in lines)


def test_one_is_no_plural():
    assert (counted(1, "engine"), counted(2000, "request")) == ("1 engine", "2,000 requests")

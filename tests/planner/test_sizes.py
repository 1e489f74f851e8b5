"""Parameters of models are those that their authors publish, to the last digit."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from jaxmoe.families import read_config
from jaxmoe.planner.sizes import checkpoint_tensors, count_parameters, kv_numbers

from ..tiny.cases import QUICK_CASES

CONFIGS = Path(__file__).parent.parent / "families" / "configs"
ROWS = list(csv.DictReader((CONFIGS / "parameters.csv").read_text(encoding="utf-8").splitlines()))


def test_every_published_config_has_its_counts():
    assert {row["config"] for row in ROWS} == {path.stem for path in CONFIGS.glob("*.json")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["config"])
def test_parameters_and_cached_bytes_are_those_published(row):
    raw = json.loads((CONFIGS / f"{row['config']}.json").read_text(encoding="utf-8"))
    config = read_config({key: value for key, value in raw.items() if key != "quantization_config"})
    counts = count_parameters(config)
    assert (counts.total, counts.active) == (int(row["total"]), int(row["active"]))
    assert sum(counts.by_part.values()) == counts.total
    assert 2 * kv_numbers(config) == int(row["kv_bytes_per_token_bf16"])


@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: case.name)
def test_published_tensors_are_those_of_a_checkpoint(case, tiny_dir):
    found = {}
    for path in sorted(tiny_dir(case.name).glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    config = read_config(case.config)
    tensors = {tensor.key: tensor.shape for tensor in checkpoint_tensors(config)}
    assert tensors == found
    assert count_parameters(config).total == sum(map(math.prod, found.values()))

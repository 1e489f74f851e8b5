"""Published config.json: each is read with the parameters that transformers counts, or refused for the reason given.

Where they were read is in configs/README.md and in each line of configs/published.jsonl; tests/families/counts.py took
the counts.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxmoe import ConfigError
from jaxmoe.config import ModelConfig
from jaxmoe.families import FAMILIES, check_other_keys, read_config, read_quantization_config, without_quantization
from jaxmoe.planner.sizes import count_parameters

CONFIGS = Path(__file__).parent / "configs"


def _rows() -> list[dict[str, Any]]:
    lines = (CONFIGS / "published.jsonl").read_text(encoding="utf-8").splitlines()
    counts = csv.DictReader((CONFIGS / "parameters.csv").read_text(encoding="utf-8").splitlines())
    totals = {row["config"]: int(row["total"]) for row in counts}
    files = [
        {
            "repository": path.stem.replace("--", "/"),
            "published": True,
            "parameters": totals[path.stem],
            "config": json.loads(path.read_text("utf-8")),
        }
        for path in sorted(CONFIGS.glob("*.json"))
    ]
    return [*map(json.loads, lines), *files]


ROWS = _rows()


def _read(raw: dict[str, Any]) -> ModelConfig:
    """The config as if its weights were plain, once what quantizes them is known: names of layers that are left out of
    that take a second to tell, and change no count."""
    read_quantization_config(raw.get("quantization_config"), planned=True)
    check_other_keys(raw)
    return read_config(without_quantization(raw))


def test_there_are_enough_of_all_families():
    published = [row for row in ROWS if row["published"]]
    assert len({row["repository"] for row in published}) == len(published) >= 60
    assert len({json.dumps(row["config"], sort_keys=True) for row in published}) >= 60
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", row["repository"]) for row in published)
    types = {row["config"]["model_type"] for row in published}
    assert set(FAMILIES) - types == {"glm4_moe", "olmoe", "llama4_text"}  # of which no whole published text was found
    assert set(FAMILIES) - {row["config"]["model_type"] for row in ROWS} == {"llama4_text"}


def test_some_were_saved_by_transformers_5():
    newer = [row["config"] for row in ROWS if row["config"].get("transformers_version", "").startswith("5.")]
    assert len([config for config in newer if "rope_parameters" in config and "dtype" in config]) >= 3


def test_each_says_where_it_was_read_and_holds_no_path_of_a_person():
    for row in ROWS[: -len(list(CONFIGS.glob("*.json")))]:
        assert re.match(r"github [\w.-]+/[\w.-]+ [^ ]+$|\w+ [\d.]+ \(PyPI\), [^ ]+$", row["read_in"]), row["read_in"]
        for part in (row["config"], row["config"].get("text_config", {})):
            assert "_name_or_path" not in row.get("left_out", []) or "_name_or_path" not in part
            assert not str(part.get("_name_or_path", "")).startswith(("/", "~", ".")), row["repository"]


def test_each_is_read_as_transformers_counts_it_or_refused():
    wrong = []
    for row in ROWS:
        try:
            found: Any = count_parameters(_read(row["config"])).total
        except ConfigError as error:
            found = str(error)
        expected = row.get("refused", row.get("parameters"))
        if not (expected in found if isinstance(expected, str) and isinstance(found, str) else expected == found):
            wrong.append((row["repository"], row.get("read_in"), expected, found))
    assert not wrong


@pytest.mark.parametrize("row", [row for row in ROWS if "refused" in row], ids=lambda row: row["repository"])
def test_what_is_refused_is_told_in_one_line_with_its_remedy(row):
    with pytest.raises(ConfigError) as caught:
        _read(row["config"])
    assert "\n" not in str(caught.value)
    assert ":" in str(caught.value) or "if harmless" in str(caught.value)

"""jaxmoe balance: what it counts, plans and moves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ..parallel.test_eplb import PUBLISHED
from .commands import jaxmoe

MODEL = "qwen3_moe_norm"


@pytest.fixture
def loads_file(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(PUBLISHED[0]["weight"]))
    return path


@pytest.mark.parametrize("example", PUBLISHED, ids=lambda example: example["name"])
def test_loads_of_a_file_are_placed_as_published(capsys, tmp_path, example):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(example["weight"]))
    redundant = example["num_replicas"] - len(example["weight"][0])
    outcome = jaxmoe(
        capsys, "balance", "--loads", path, "--ranks", example["num_gpus"], "--redundant-experts", redundant,
        "--nodes", example["num_nodes"], "--groups", example["num_groups"], "--algorithm", "eplb", "--json",
    )  # fmt: skip
    found = json.loads(outcome.out)
    assert (outcome.code, found["placement"]["physical_to_logical_map"]) == (0, example["phy2log"])
    np.testing.assert_allclose(found["planned"]["by_layer"], example["balancedness_mean_over_max_per_layer"])
    assert found["before"]["balancedness"] < found["planned"]["balancedness"]


def test_loads_of_a_file_are_placed_without_duplicates_by_default(capsys, tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps([[0, 0, 0, 7, *[0] * 60]]))
    asked = ("balance", "--loads", path, "--ranks", 8, "--redundant-experts", 8, "--json")
    default, published = (json.loads(jaxmoe(capsys, *asked, *more).out) for more in ([], ["--algorithm", "eplb"]))
    assert (default["algorithm"], published["algorithm"]) == ("distinct", "eplb")
    assert default["planned"]["balancedness"] == 1.0
    assert published["planned"]["balancedness"] == 0.5625


def test_a_model_is_counted_balanced_and_counted_again(capsys, tiny_dir, tmp_path):
    picture = tmp_path / "loads.svg"
    outcome = jaxmoe(
        capsys, "balance", tiny_dir(MODEL), "--mesh", "data=2,expert=4", "--redundant-experts", 4, "--max-tokens", 8,
        "--plot", picture, "--json",
    )  # fmt: skip
    found = json.loads(outcome.out)
    assert outcome.code == 0
    for form in ("before", "planned", "after"):
        assert np.array(found[form]["rank_loads"]).shape == (found["layers"], 4)
        assert 0 < found[form]["balancedness"] <= 1
    assert np.sum(found["before"]["rank_loads"]) == np.sum(found["after"]["rank_loads"])
    drawn = picture.read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert "</svg>" in drawn


def test_a_person_sees_a_table_and_one_sentence(capsys, loads_file, tmp_path):
    picture = tmp_path / "loads.png"
    outcome = jaxmoe(
        capsys, "balance", "--loads", loads_file, "--ranks", 8, "--redundant-experts", 4, "--plot", picture
    )
    assert outcome.code == 0
    assert "planned" in outcome.out
    assert "12 experts in 16 expert slots on 8 ranks" in outcome.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loads", "LOADS"], "--loads and --ranks must be given together"),
        (["--ranks", "8"], "--loads and --ranks must be given together"),
        (["demo", "--loads", "LOADS", "--ranks", "8"], "leave model out"),
        (["--loads", "LOADS", "--ranks", "8", "--mesh", "data=2", "--max-tokens", "4"], "leave mesh, max_tokens out"),
        (["--loads", "HUGE", "--ranks", "2"], "numbers in [0, 1e18]"),
        (["--loads", "TEXT", "--ranks", "2"], "numbers in [0, 1e18]"),
        (["--loads", "LOADS", "--ranks", "8", "--redundant-experts", "99999999999"], "must lie in [0, 180]"),
        (["--loads", "LOADS", "--ranks", "100000000000"], "--ranks 100000000000 must lie in [1, 192]"),
        (["--loads", "nowhere.json", "--ranks", "8"], "nowhere.json cannot be read"),
        (["--loads", "RAGGED", "--ranks", "8"], "per layer, all of one length"),
        (["--loads", "LOADS", "--ranks", "8", "--groups", "5"], "12 experts do not divide among 5 groups"),
        (["--loads", "LOADS", "--ranks", "8", "--algorithm", "best"], "must be one of distinct, eplb"),
        (["--loads", "LOADS", "--ranks", "8", "--nodes", "3"], "8 ranks do not divide among 3 nodes"),
        (["--loads", "LOADS", "--ranks", "8", "--redundant-experts", "-1"], "redundant_experts=-1"),
        (["--loads", "LOADS", "--ranks", "8", "--plot", "loads.pdf"], "must end in .png or .svg"),
        (["--loads", "LOADS", "--ranks", "8", "--plot", "nowhere/loads.png"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, loads_file, tmp_path, arguments, words):
    (tmp_path / "ragged.json").write_text("[[1, 2], [3]]")
    (tmp_path / "huge.json").write_text(f"[[{10**400}, 1]]")
    (tmp_path / "text.json").write_text('[[true, "3"]]')
    named = {name: str(tmp_path / f"{name.lower()}.json") for name in ("HUGE", "TEXT")}
    named |= {"LOADS": str(loads_file), "RAGGED": str(tmp_path / "ragged.json")}
    outcome = jaxmoe(capsys, "balance", *(named.get(word, word) for word in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_model_without_experts_is_refused(capsys, tiny_dir):
    outcome = jaxmoe(capsys, "balance", tiny_dir("llama_llama3"), "--mesh", "data=8")
    assert outcome.code == 2
    assert "no experts" in outcome.err

"""jaxmoe map: a page or its data, and one line for whatever cannot be."""

from __future__ import annotations

import json
import os

import pytest

from jaxmoe.aot import fit

from ..map.parts import answer_of
from .commands import jaxmoe

CASE = "qwen3_moe_norm"
OPTIONS = ["--mesh", "data=4,expert=16,tensor=2", "--max-num-seqs", 8]


def data_of(page: str) -> dict:
    """What a page carries."""
    return json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_the_page_is_one_file_with_all_it_needs(capsys, tiny_dir, tmp_path):
    path = tmp_path / "map.html"
    outcome = jaxmoe(capsys, "map", tiny_dir(CASE), *OPTIONS, "-o", path)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{path}: a device holds ")
    assert os.listdir(tmp_path) == ["map.html"]
    page = path.read_text(encoding="utf-8")
    printed = jaxmoe(capsys, "map", tiny_dir(CASE), *OPTIONS, "--json")
    assert (printed.code, printed.out.count("\n")) == (0, 1)
    assert data_of(page) == json.loads(printed.out)
    rest = page.replace("http://www.w3.org/2000/svg", "")
    assert not [word for word in ("http:", "https:", "//cdn", "import ", "url(h", "src=", "/*DATA*/") if word in rest]


def test_a_context_that_nobody_names_is_one_the_model_has(capsys, tiny_dir):
    printed = json.loads(jaxmoe(capsys, "map", tiny_dir(CASE), *OPTIONS, "--json").out)
    assert printed["context"] == 128
    assert (printed["fabric"]["given"], printed["fabric"]["node"]) == (False, 128)


def test_no_name_ends_the_script(capsys, tiny_dir, tmp_path):
    folder = tmp_path / "<script>evil"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_dir(CASE) / "config.json").read_text())
    assert jaxmoe(capsys, "map", folder / "config.json", *OPTIONS, "-o", tmp_path / "map.html").code == 0
    page = (tmp_path / "map.html").read_text()
    assert page.count("<script") == 2
    assert data_of(page)["model"] == "<script>evil"


def test_a_target_is_compiled_for_as_jaxmoe_compile_does(capsys, monkeypatch):
    """Here with a compiler that finds nothing of what was planned, but another collective."""
    asked: list[fit.CompileRequest] = []
    options = [
        "--mesh",
        "expert=16",
        "--target",
        "b200:2x8",
        "--max-num-seqs",
        8,
        "--context",
        256,
        "--kv-dtype",
        "fp8",
    ]
    row = {"phase": "decode", "op": "all-reduce", "axes": ["data"], "count": 3, "bytes": 12, "planned": 0}
    here = json.loads(jaxmoe(capsys, "map", "demo", *options[:2], *options[4:], "--json").out)
    answer = answer_of(here, target="b200:2x8", collectives=[row])
    monkeypatch.setattr(fit, "compile_for", lambda question, on_phase: asked.append(question) or answer)
    printed = json.loads(jaxmoe(capsys, "map", "demo", *options, "--json").out)
    plain = {"model": "demo", "target": "b200:2x8", "mesh": "expert=16", "max_num_seqs": 8}
    assert asked == [fit.CompileRequest.of(**plain, context=256, kv_dtype="fp8")]
    assert (printed["compiled"]["target"], printed["fabric"]["name"]) == ("b200:2x8", "b200")
    compiled = [row["compiled"] for row in printed["collectives"] if row["phase"] == "decode"]
    assert compiled == [0] * (len(compiled) - 1) + [3]


def test_an_answer_in_a_file_is_shown(capsys, tmp_path, tiny_dir):
    plain = json.loads(jaxmoe(capsys, "map", tiny_dir(CASE), *OPTIONS, "--json").out)
    answer = answer_of(plain, target="h100:16x8")
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    command = ["map", tiny_dir(CASE), *OPTIONS, "--json", "--compiled", tmp_path / "answer.json"]
    printed = json.loads(jaxmoe(capsys, *command).out)
    assert all(row["compiled"] == row["planned"] for row in printed["collectives"])
    assert printed["fabric"]["name"] == "h100"
    refused = jaxmoe(capsys, *command, "--hardware", "v5p")
    assert "hardware v5p and target h100:16x8 differ" in refused.err
    answer["mesh"] = plain["mesh"] | {"data": 8}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    refused = jaxmoe(capsys, *command)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "mesh=data=8,pipeline=1,expert=16,tensor=2, this map has mesh=data=4,pipeline=1,expert=16" in refused.err
    older = answer | {"batch": answer["max_num_seqs"], "stage_chunks": 1}
    del older["max_num_seqs"], older["virtual_stages"]
    (tmp_path / "answer.json").write_text(json.dumps(older))
    refused = jaxmoe(capsys, *command)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "the compile result has no virtual_stages, max_num_seqs, so it cannot be compared" in refused.err


def test_an_output_that_cannot_be_written_leaves_nothing(capsys, tiny_dir, tmp_path, monkeypatch):
    path = tmp_path / "map.html"
    path.write_text("old")

    def no_room(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    outcome = jaxmoe(capsys, "map", tiny_dir(CASE), *OPTIONS, "-o", path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "map.html cannot be written: No space left on device" in outcome.err
    assert os.listdir(tmp_path) == ["map.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["dem", "demmo"])
def test_a_model_that_is_not_known_brings_its_nearest(name, capsys):
    outcome = jaxmoe(capsys, "map", name, *OPTIONS, "--json")
    assert outcome.code == 2
    assert f"config '{name}' is not a config.json, a folder with one, or a preset (demo, " in outcome.err
    assert "; did you mean demo?" in outcome.err

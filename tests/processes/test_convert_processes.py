"""Conversion by several processes: the bytes that one process writes, also after a kill of any of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.weights import shards
from jaxmoe.weights.convert import convert
from jaxmoe.weights.journal import partial_path
from jaxmoe.weights.manifest import JOURNAL

from ..weights.hf_checkpoints import contents, every_dtype, write_checkpoint_dir
from .groups import finish, free_port, start

CASE = "mixtral_window"
SHARD_BYTES = 700  # the tensors of a source here take a few of such files


@pytest.fixture
def source(tmp_path) -> Path:
    return every_dtype(tmp_path / "source")


def probed(tmp_path: Path, *runs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run tests/processes/convert_probe.py."""
    defaults = {"num_processes": 2, "folder": str(tmp_path), "shard_bytes": None, "kill": None}
    (tmp_path / "runs.json").write_text(json.dumps([defaults | run for run in runs]))
    (ended,) = finish([start(["tests.processes.convert_probe", str(tmp_path / "runs.json")])])
    assert ended.code == 0, ended.err
    (tmp_path / "runs.json").unlink()
    return [json.loads(line) for line in ended.out.splitlines()]


def launched(*arguments: object) -> subprocess.Popen[str]:
    return start(["jaxmoe", "launch", "-n", "2", "--", "convert", *map(str, arguments), "--json"])


def process_of(launch: subprocess.Popen[str], process_id: int) -> int:
    """The pid of one of the processes that a launch has started."""
    for pid in Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split():
        if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-3:-1] == ["--process-id", str(process_id)]:
            return int(pid)
    raise AssertionError(f"no process {process_id}")


def one_process(monkeypatch: pytest.MonkeyPatch, shard_bytes: int, *arguments: Path, **options: Any) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shards.ShardSink.__init__, "__defaults__", (shard_bytes,))
        convert(*arguments, **options)


def test_both_directions_and_quantized(source, tiny_dir, tmp_path, monkeypatch):
    """Every file by name and bytes: three processes, several shards, a matrix and its scales in different shards."""
    convert(source, tmp_path / "orbax")
    one_process(monkeypatch, SHARD_BYTES, tmp_path / "orbax", tmp_path / "hf")
    model = tiny_dir(CASE)
    quantized = {"to": "hf", "weights_dtype": "int8"}
    one_process(monkeypatch, 3000, model, tmp_path / "int8", **quantized)
    convert(model, tmp_path / "bf16", mesh="expert=2", weights_dtype="bfloat16")
    wanted = ["orbax", "hf", "int8", "bf16"]
    runs = [
        {"arguments": ["source", "orbax.n", "--verify", "--json"], "num_processes": 3},
        {"arguments": ["orbax.n", "hf.n", "--verify", "--json"], "num_processes": 3, "shard_bytes": SHARD_BYTES},
        {
            "arguments": [str(model), "int8.n", "--to", "hf", "--weights-dtype", "int8", "--json"],
            "num_processes": 3, "shard_bytes": 3000,
        },
        {"arguments": [str(model), "bf16.n", "--mesh", "expert=2", "--weights-dtype", "bfloat16", "--json"]},
    ]  # fmt: skip
    for name, run, ended in zip(wanted, runs, probed(tmp_path, *runs), strict=True):
        assert [one["code"] for one in ended] == [0] * len(ended), ended
        assert contents(tmp_path / f"{name}.n") == contents(tmp_path / name), name
        assert json.loads(ended[0]["out"])["verified"] == ("--verify" in run["arguments"])
        assert not any(one["out"] for one in ended[1:])
        assert not any(one["backend"] for one in ended)
        steps = [one["steps"] for one in ended]
        assert min(steps) > 3, steps  # each has written tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", *wanted, *(f"{n}.n" for n in wanted)])


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_killed_process_and_the_same_command_again(victim, tmp_path):
    rng = random.Random(victim)
    tensors = {f"t{index}": ("U8", (5,), rng.randbytes(5)) for index in range(800)}
    source = write_checkpoint_dir(tmp_path / "source", tensors)
    convert(source, tmp_path / "one")
    partial = partial_path(tmp_path / "two")
    pattern = JOURNAL if victim == 0 else JOURNAL.replace(".", f".*.{victim}.")
    launch, recorded, deadline = launched(source, tmp_path / "two"), 0, time.monotonic() + 60
    while recorded < 10:  # lines of the victim's journal
        assert launch.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
        recorded = sum(path.read_bytes().count(b"\n") for path in partial.glob(pattern))
    os.kill(process_of(launch, victim), signal.SIGKILL)
    (killed,) = finish([launch])
    assert killed.code == 128 + signal.SIGKILL
    assert f"process {victim} (" in killed.err
    assert "was lost" in killed.err
    assert not (tmp_path / "two").exists()
    (again,) = finish([launched(source, tmp_path / "two")])
    assert again.code == 0, again.err
    assert json.loads(again.out)["resumed_tensors"] >= recorded - 1  # a journal's first line names no tensor
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"]


MOMENTS = [n / 12 for n in range(1, 12)] + [0.94, 0.96, 0.98, 0.99, 1]
SWEEPS = [pytest.param(victim, to, MOMENTS, marks=pytest.mark.sweep) for victim in (0, 1) for to in ("orbax", "hf")]


@pytest.mark.parametrize(("victim", "to", "moments"), [(0, "hf", [0.5, 0.97]), *SWEEPS])
def test_killed_at_a_step_and_the_same_command_again(victim, to, moments, source, tmp_path):
    """moments: fractions of the steps of an undisturbed run, each of a conversion of its own."""

    def run(number: int | str, *kill: float) -> dict[str, Any]:
        return {
            "arguments": ["source", f"out{number}", "--to", to], "shard_bytes": SHARD_BYTES, "kill": kill or None,
        }  # fmt: skip

    pairs = [(run(number, victim, moment), run(number)) for number, moment in enumerate(moments)]
    _, *ended = probed(tmp_path, run(""), *(one for pair in pairs for one in pair))
    for number, (killed, again) in enumerate(zip(ended[::2], ended[1::2], strict=True)):
        assert killed[victim]["code"] == -signal.SIGKILL, killed
        assert killed[1 - victim]["code"] == 3
        assert f"process {victim} (" in killed[1 - victim]["err"]
        whole = again[0]["code"] == 2 and f"out{number} exists" in again[0]["err"]  # the last steps remove the journal
        assert [one["code"] for one in again] == [0, 0] or (whole and moments[number] > 0.9), again
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / "out")
        assert not partial_path(tmp_path / f"out{number}").exists() or whole


def test_one_process_that_fails_ends_all(source, tmp_path):
    """A damaged tensor is named by the process that reads it."""
    convert(source, tmp_path / "orbax")
    chunk = next(path for path in sorted((tmp_path / "orbax" / "cube").iterdir()) if path.name != ".zarray")
    chunk.write_bytes(bytes(30))
    runs = [{"arguments": ["orbax", "hf"], "shard_bytes": SHARD_BYTES}, {"arguments": ["orbax", "--verify"]}]
    (first, second), verified = probed(tmp_path, *runs)
    assert (first["code"], second["code"]) == (2, 2)
    assert "jaxmoe: error: process 1: tensor 'cube' of the source differs from its checksum" in first["err"]
    assert "jaxmoe: error: tensor 'cube' of the source differs from its checksum" in second["err"]
    assert not (tmp_path / "hf").exists()
    assert [one["code"] for one in verified] == [1, 1]
    assert "is corrupt: tensor 'cube' differs from its checksum; convert again" in verified[0]["err"]
    assert verified[1]["err"] == ""


def test_processes_with_other_sources_end_and_those_with_copies_do_not(source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    every_dtype(other / "source", seed=1)
    changed = json.loads((other / "source" / "config.json").read_text()) | {"more": 1}
    (other / "source" / "config.json").write_text(json.dumps(changed))
    shutil.copytree(source, tmp_path / "copy" / "source")
    convert(source, tmp_path / "one")
    before = contents(tmp_path)
    runs = [
        {"arguments": ["source", str(tmp_path / "out")], "folder": [str(tmp_path), str(folder)]}
        for folder in (other, tmp_path / "copy")
    ]
    ended, copied = probed(tmp_path, *runs)
    assert [one["code"] for one in copied] == [0, 0], copied
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    shutil.rmtree(tmp_path / "out")
    for one in ended:
        assert one["code"] == 2, one
        (line,) = one["err"].splitlines()
        assert line.startswith("jaxmoe: error: the source is 19 tensors of "), line
        assert line.endswith(" in process 1: start both alike")
    assert contents(tmp_path) == before


def test_other_options_are_named(source, tmp_path):
    before = contents(tmp_path)
    port = free_port()
    ended = finish(
        [
            start(
                [
                    "jaxmoe", "convert", str(source), str(tmp_path / "out"), "--weights-dtype", dtype, "--coordinator",
                    f"localhost:{port}", "--num-processes", "2", "--process-id", str(index),
                ]
            )
            for index, dtype in enumerate(("float32", "bfloat16"))
        ]
    )  # fmt: skip
    for one in ended:
        assert one.code == 2, one
        line = "jaxmoe: error: --weights-dtype is float32 in process 0 and bfloat16 in process 1: start both alike"
        assert one.err.splitlines() == [line]
    assert contents(tmp_path) == before

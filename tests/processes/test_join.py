"""Processes that cannot act as one: one clear line in each, exit code 2, nothing left running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from .groups import ProcessResult, assert_nothing_is_left, finish, free_port, start, start_script

CASE = "llama_mha"
MESH = ("--mesh", "data=2,tensor=2")


def command(
    model: Path, port: int, process_id: int, *more: str, num_processes: int = 2, timeout: str = "8"
) -> list[str]:
    return [
        "jaxmoe", "generate", str(model), "--prompt-ids", str(model / "ids.jsonl"), "--json", "--dtype", "float32",
        "--max-tokens", "4", "--devices", "2", "--coordinator", f"localhost:{port}", "--num-processes",
        str(num_processes), "--process-id", str(process_id), "--join-timeout", timeout, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_dir) -> Path:
    directory = tiny_dir(CASE)
    (directory / "ids.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    return directory


def ended(commands: Sequence[list[str]], port: int) -> list[ProcessResult]:
    """Start all, wait for all, and look that nothing of them is left."""
    results = finish([start(one) for one in commands], most_seconds=90)
    assert_nothing_is_left(port)
    return results


def assert_lines(results: Sequence[ProcessResult], *parts: str) -> None:
    for one in results:
        assert one.code == 2, one
        (line,) = [line for line in one.err.splitlines() if line.startswith("jaxmoe:")]
        assert line.startswith("jaxmoe: error: ")
        assert all(part in line for part in parts), line
        assert one.out == ""


def test_two_processes_of_one_id(model):
    port = free_port()
    results = ended([command(model, port, at, *MESH, num_processes=3) for at in (0, 1, 1)], port)
    assert_lines(results, "both have process_id=1", "give each its own")


def test_a_missing_process_is_named(model):
    port = free_port()
    results = ended([command(model, port, 0, *MESH, num_processes=3, timeout="3")], port)
    assert_lines(results, "processes 1, 2 of 3 did not join within 3 s")


def test_a_coordinator_that_is_not_there(model):
    port = free_port()
    results = ended([command(model, port, 1, *MESH, timeout="2")], port)
    assert_lines(results, f"no coordinator answers at localhost:{port}", "start process 0 there")


def test_other_arguments(model):
    port = free_port()
    results = ended([command(model, port, at, *MESH, "--seed", str(at)) for at in (0, 1)], port)
    assert_lines(results, "--seed is 0 in process 0 and 1 in process 1")


def test_another_checkpoint(model, changed_dir):
    port = free_port()
    first = command(model, port, 0, *MESH)
    other = changed_dir(CASE, rope_theta=20000.0)
    (other / "ids.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    script = "import os,sys; os.chdir(sys.argv.pop(1)); from jaxmoe.cli.main import run; run(sys.argv[1:])"
    relative = [".", "--prompt-ids", "ids.jsonl", *first[5:]]
    results = finish(
        [
            start_script(script, [str(at), "generate", *relative, "--process-id", str(index)])
            for index, at in enumerate((model, other))
        ]
    )
    assert_lines(results, "config.json is ", "in process 0 and ", "in process 1: start both alike")


def test_other_versions(model):
    port = free_port()
    script = (
        "import sys, jaxmoe; jaxmoe.__version__ = sys.argv.pop(1); from jaxmoe.cli.main import run; run(sys.argv[1:])"
    )
    commands = [[version, *command(model, port, at, *MESH)[1:]] for at, version in enumerate(("0.1.0", "9.9"))]
    results = finish([start_script(script, one) for one in commands])
    assert_lines(results, "jaxmoe is 0.1.0 in process 0 and 9.9 in process 1")


def test_a_mesh_that_the_devices_do_not_make(model):
    port = free_port()
    results = ended([command(model, port, at, "--mesh", "tensor=8") for at in (0, 1)], port)
    assert_lines(results, "8 devices")


def test_a_checkpoint_that_one_process_cannot_read(model, changed_dir):
    port = free_port()
    other = changed_dir(CASE, rope_theta=30000.0)
    (other / "ids.jsonl").write_text("[1, 2, 3]\n", encoding="utf-8")
    (weights,) = other.glob("*.safetensors")
    config = (model / "config.json").read_text("utf-8")
    (other / "config.json").write_text(config, encoding="utf-8")
    weights.write_bytes(weights.read_bytes()[:-64])
    script = "import os,sys; os.chdir(sys.argv.pop(1)); from jaxmoe.cli.main import run; run(sys.argv[1:])"
    relative = [".", "--prompt-ids", "ids.jsonl", *command(model, port, 0, *MESH)[5:]]
    results = finish(
        [
            start_script(script, [str(at), "generate", *relative, "--process-id", str(index)])
            for index, at in enumerate((model, other))
        ]
    )
    assert_lines(results, weights.name)

"""jaxmoe launch: one command in several processes of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from .commands import jaxmoe
from .test_process import environment


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "0", "--", "generate"], "-n 0 must lie in [1, 64]"),
        (["-n", "65", "--", "generate"], "-n 65 must lie in [1, 64]"),
        (["-n", "2"], "no command: give one after --"),
        (["-n", "2", "--", "generate", "--process-id", "1"], "--process-id: launch sets this for every process"),
        (["-n", "2", "--", "generate", "--devices=2"], "--devices=2: launch sets this for every process"),
        (["--", "generate"], "Missing option '-n'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, words, capsys):
    outcome = jaxmoe(capsys, "launch", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def launched(tmp_path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmoe", "launch", "-n", "2", "--devices", "2", "--", *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path), cwd=tmp_path,
    )  # fmt: skip


def test_output_is_that_of_process_0_and_errors_have_an_index(tmp_path):
    options = ["--mesh", "data=2,tensor=2", "--max-tokens", "3", "--json", "--dtype", "float32", "--prompt", "import"]
    out, err = launched(tmp_path, "generate", *options).communicate(timeout=300)
    (line,) = out.splitlines()
    assert len(json.loads(line)["token_ids"]) == 3, err
    process = launched(tmp_path, "generate", "--mesh", "tensor=16")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    first, second = sorted(line for line in err.splitlines() if "jaxmoe: error" in line)
    assert second.startswith("jaxmoe: error: ")
    assert first.startswith("[1] jaxmoe: error: ")


def test_its_processes_end_with_it(tmp_path):
    process = launched(tmp_path, "bench", "--cases", "2x16x400", "--repeats", "1000", "--mesh", "data=2,tensor=2")
    deadline = time.monotonic() + 120
    while len(members(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = members(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "a process outlives its launcher"
        time.sleep(0.1)


def members(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    return [int(one) for one in found.stdout.split()]


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1] not in ("", "Z")

"""A process that dies or stops answering makes all others end, with one line that names it and exit code 3."""

from __future__ import annotations

import random
import signal
import time
from itertools import product
from pathlib import Path

import pytest

from .groups import assert_nothing_is_left, finish, free_port, start
from .phases import LOST_AFTER, PHASES

CASE = "qwen3_moe_norm"
ROUNDS = 4
SWEEP = pytest.mark.sweep
MOMENTS = [(signal.SIGKILL, 1, "decode", 0), (signal.SIGSTOP, 0, "compiling", 0)]  # the others are swept
ALL = [
    pytest.param(*moment, marks=() if moment in MOMENTS else SWEEP)
    for moment in product((signal.SIGKILL, signal.SIGSTOP), (0, 1), PHASES[1:], (0, 1))
]


def started(model: Path, folder: Path, port: int) -> list:
    return [
        start(
            ["tests.processes.phases", str(port), "2", str(i), "4", str(model), str(folder / f"{i}.log"), str(ROUNDS)]
        )
        for i in range(2)
    ]


def wait_for(log: Path, phase: str, *, most_seconds: float = 120) -> None:
    deadline = time.monotonic() + most_seconds
    while not (log.exists() and phase in log.read_text("utf-8").split()):
        assert time.monotonic() < deadline, f"{phase} does not come"
        time.sleep(0.005)


@pytest.mark.parametrize(("sent", "victim", "phase", "number"), ALL)
def test_a_lost_process_ends_all_others_with_its_name(sent, victim, phase, number, tiny_dir, tmp_path):
    port = free_port()
    processes = started(tiny_dir(CASE), tmp_path, port)
    try:
        wait_for(tmp_path / f"{victim}.log", phase)
        time.sleep(random.Random(f"{sent} {victim} {phase} {number}").uniform(0, 0.3))
        processes[victim].send_signal(sent)
        (survivor,) = finish([processes[1 - victim]], most_seconds=LOST_AFTER + 10)
    finally:
        processes[victim].send_signal(signal.SIGCONT)
        processes[victim].kill()
        finish([processes[victim]])
    lines = [line for line in survivor.err.splitlines() if line.startswith("jaxmoe:")]
    assert survivor.code == 3, survivor
    assert len(lines) == 1
    assert f"process {victim} (" in lines[0]
    assert "was lost" in lines[0]
    assert_nothing_is_left(port)


def test_the_same_command_starts_again_at_once(tiny_dir, tmp_path):
    port = free_port()
    processes = started(tiny_dir(CASE), tmp_path, port)
    wait_for(tmp_path / "0.log", "prefill")
    processes[0].kill()
    again = started(tiny_dir(CASE), tmp_path, port)
    ended = finish([*processes, *again])
    assert [one.code for one in ended] == [-signal.SIGKILL, 3, 0, 0]
    assert ended[2].out.split("TOKENS")[1] == ended[3].out.split("TOKENS")[1]

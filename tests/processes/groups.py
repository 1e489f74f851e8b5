"""Groups of real processes for tests: started together, their output and exit codes collected."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.parallel.address import free_port

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 1500


class ProcessResult(NamedTuple):
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start a Python module of this repository: arguments of python -m."""
    return _start(["-m", *arguments])


def start_script(script: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start the text of a Python script with arguments."""
    return _start(["-c", script, *arguments])


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen[str]], *, most_seconds: float = MOST_SECONDS) -> list[ProcessResult]:
    """Wait for processes and collect their output. Ends those that take too long, which fails the test."""
    deadline, results = time.monotonic() + most_seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            results.append(ProcessResult(process.returncode, out, without_noise(err)))
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.communicate()
    return results


def without_noise(text: str) -> str:
    """Lines that are the package's own, also through launch: not what libraries of C++ log when a peer goes away."""
    own = re.compile(r"(\[\d+\] )?jaxmoe:")
    return "\n".join(line for line in text.splitlines() if own.match(line) or "Error" in line)


def results_of(num_processes: int, devices: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run tests/processes/scenario.py in a group, and return the results that process 0 printed."""
    return results_of_each(num_processes, devices, runs)[0]


def results_of_each(num_processes: int, devices: int, runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run tests/processes/scenario.py in a group, and return the results that each process printed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(runs, file)
    port = str(free_port())
    module = "tests.processes.scenario"
    processes = [
        start([module, port, str(num_processes), str(index), str(devices), file.name]) for index in range(num_processes)
    ]
    ended = finish(processes)
    os.unlink(file.name)
    assert [one.code for one in ended] == [0] * num_processes, "\n".join(one.err[-2000:] for one in ended)
    return [[json.loads(line[7:]) for line in one.out.splitlines() if line.startswith("RESULT ")] for one in ended]


def coordinators(port: int) -> set[int]:
    """Process ids of the coordinators of a port that run on this machine."""
    command = ["pgrep", "-f", f"jaxmoe.parallel.coordinator {port}$"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return {int(one) for one in found.stdout.split()}


def assert_nothing_is_left(port: int) -> None:
    """A coordinator may take a few seconds to see that all processes have ended."""
    deadline = time.monotonic() + 8
    while (coordinators(port) or not is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not coordinators(port)
    assert is_free(port)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError:
            return False
        return True

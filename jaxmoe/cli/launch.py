"""The command `jaxmoe launch`: start one command in several processes of this machine that act as one."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import click

from jaxmoe.errors import MeshError, RequestError
from jaxmoe.parallel.address import free_port
from jaxmoe.parallel.timeouts import LAST_SECONDS, LOST_AFTER_SECONDS

_MAX_PROCESSES = 64
_PROCESS_OPTIONS = ("--coordinator", "--num-processes", "--process-id", "--devices", "--lost-after")
_PR_SET_PDEATHSIG = 1


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-n", "--num-processes", type=int, required=True, help="Number of processes.")
@click.option("--devices", type=int, help="Emulate this many devices on the CPU in each process.")
@click.option(
    "--lost-after", type=float, default=LOST_AFTER_SECONDS, show_default=True,
    help="Seconds without a sign of life after which a process is lost, and all others end.",
)  # fmt: skip
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="COMMAND [ARGS]...")
def launch(num_processes: int, devices: int | None, lost_after: float, arguments: tuple[str, ...]) -> int:
    """Run a command in several processes of this machine.

    COMMAND is a command of jaxmoe with its arguments, for example "generate MODEL". The output of process 0 is shown,
    and the errors of the others with their index. If one process ends with an error, all end. The exit code is that of
    the first process that failed.
    """
    if not 1 <= num_processes <= _MAX_PROCESSES:
        raise MeshError(f"-n {num_processes} must lie in [1, {_MAX_PROCESSES}]")
    if not arguments:
        raise RequestError("no command: give one after --, as in jaxmoe launch -n 2 -- generate")
    given = [one for one in arguments if one.split("=")[0] in _PROCESS_OPTIONS]
    if given:
        raise RequestError(f"{', '.join(given)}: launch sets this for every process; remove it, or give it before --")
    shared = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(num_processes)]
    shared += ["--lost-after", f"{lost_after:g}"]
    shared += [] if devices is None else ["--devices", str(devices)]
    command = [sys.executable, "-m", "jaxmoe", *arguments, *shared]
    children = [_start([*command, "--process-id", str(index)], index) for index in range(num_processes)]
    try:
        return _wait(children, lost_after + LAST_SECONDS)
    except KeyboardInterrupt:
        _end(children, signal.SIGINT)
        raise
    finally:
        _end(children, signal.SIGTERM)


def _start(command: Sequence[str], index: int) -> subprocess.Popen[str]:
    """Start a process. The errors of all but the first are shown with its index, line by line."""
    if index == 0:
        return subprocess.Popen(command, text=True, preexec_fn=_die_with_parent())
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", preexec_fn=_die_with_parent(),
    )  # fmt: skip
    threading.Thread(target=_show_errors, args=(child, index), daemon=True).start()
    return child


def _die_with_parent() -> Callable[[], None] | None:
    """Return a function that makes a new process end if this one is killed. None where that is not possible."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _show_errors(child: subprocess.Popen[str], index: int) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        print(f"[{index}] {line.rstrip()}", file=sys.stderr, flush=True)


def _wait(children: list[subprocess.Popen[str]], limit_s: float) -> int:
    """Wait until all processes have ended, or one has failed and the others do not end within limit_s seconds."""
    failed, since = 0, None
    while True:
        codes = [child.poll() for child in children]
        if not failed:
            failed = next((code for code in codes if code), 0)
        if failed and since is None:
            since = time.monotonic()
        if None not in codes or (since is not None and time.monotonic() - since > limit_s):
            return failed if failed >= 0 else 128 - failed
        time.sleep(0.05)


def _end(children: list[subprocess.Popen[str]], sent: signal.Signals) -> None:
    """End the processes that run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(sent)
    deadline = time.monotonic() + LAST_SECONDS
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()

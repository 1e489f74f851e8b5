"""Run as a process of its own: converts, killed with SIGKILL at steps of its work, then to the end; prints JSON.

python -m tests.weights.kill_probe SRC DST SEED NUM_KILLS [TO]

A step is anything the file system is asked for inside DST's folder, or a write, of which only half is done when the
kill comes. Every kill is of a child forked from here, so that the imports are paid once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import IO, Any

from jaxmoe.weights import journal, shards, store
from jaxmoe.weights.convert import convert

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree")
_lock = threading.Lock()


class Steps:
    """Counts steps and kills this process at one of them."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count, self._last, self._folder = 0, last, str(folder)

    def step(self) -> bool:
        """Whether this one is the last."""
        with _lock:
            self.count += 1
            return self.count == self._last

    def on_audit(self, event: str, args: tuple[Any, ...]) -> None:
        """sys.addaudithook's."""
        if event in _EVENTS and any(str(arg).startswith(self._folder) for arg in args[:2]) and self.step():
            os.kill(os.getpid(), signal.SIGKILL)

    def write_all(self, file: IO[bytes], part: memoryview) -> None:
        """writing.write_all, the last time by half."""
        if self.step():
            file.write(part[: len(part) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(part)


def run_child(source: Path, destination: Path, to: str | None, last: int | None) -> tuple[int, int]:
    """(signal or 0, steps counted) of a conversion in a child of this process."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            steps = Steps(destination.parent, last)
            sys.addaudithook(steps.on_audit)
            store.write_all = shards.write_all = steps.write_all
            convert(source, destination, to=to)
            os.write(writing, str(steps.count).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the conversion failed by itself"
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(said or 0)


def main(source: str, destination: str, seed: str, num_kills: str, to: str | None = None) -> None:
    """An undisturbed run into DST.whole, then the kills and a last run into DST."""
    warnings.simplefilter("ignore")  # JAX's, of forking: nothing here runs on its threads
    start, end, rng = Path(source), Path(destination), random.Random(int(seed))
    undisturbed = end.with_name(end.name + ".whole")
    _, steps = run_child(start, undisturbed, to, None)
    killed, looked_whole = 0, 0
    for number in range(int(num_kills)):
        # early and late points alike, and the very last ones too: what is left gets shorter by what is kept
        last = rng.randrange(1, steps + 1) if number % 4 else rng.randrange(max(1, steps - 12), steps + 1)
        signal_number, _ = run_child(start, end, to, last)
        killed += signal_number == signal.SIGKILL
        if end.exists():
            looked_whole += 1
            assert sorted(p.name for p in end.rglob("*")) == sorted(p.name for p in undisturbed.rglob("*"))
            if (journal.partial_path(end) / journal.JOURNAL).exists():  # the same command says that it has ended
                run_child(start, end, to, None)
                assert not journal.partial_path(end).exists()
            shutil.rmtree(end)
    run_child(start, end, to, None)
    print(json.dumps({"steps": steps, "killed": killed, "committed": looked_whole}))


if __name__ == "__main__":
    main(*sys.argv[1:])

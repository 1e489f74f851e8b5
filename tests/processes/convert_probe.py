"""Runs of `jaxmoe convert` in several processes each, forked from here so that the imports are paid once.

python -m tests.processes.convert_probe RUNS.json

A run is {"arguments": of jaxmoe convert, "num_processes": N, "folder": the working directory or one for each process,
"shard_bytes": of a file, or null, "kill": [process, fraction of its steps in the first run of all] or null}. Steps are
those of tests/weights/kill_probe.py, counted in the folder of the destination. Prints a JSON list for each run, with an
object for each process: its exit code (negative: a signal), its steps, what it printed, and whether it started a
backend of JAX.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from jax._src import xla_bridge

from jaxmoe.cli.main import run as run_command
from jaxmoe.weights import convert, shards, store

from ..weights.kill_probe import Steps
from .groups import free_port, without_noise

assert convert  # imported once, for all


def run_child(run: dict[str, Any], index: int, last: int | None, port: int, files: Path) -> None:
    """Run the command in this process, which then exits, or is killed at its step `last`."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(files / f"{name}.{index}", os.O_WRONLY | os.O_CREAT), number)
    folder = run["folder"] if isinstance(run["folder"], str) else run["folder"][index]
    os.chdir(folder)
    steps = Steps(Path(run["arguments"][1]).absolute().parent, last)
    sys.addaudithook(steps.on_audit)
    store.write_all = shards.write_all = steps.write_all
    if run["shard_bytes"] is not None:
        shards.ShardSink.__init__.__defaults__ = (run["shard_bytes"],)
    joining = ["--coordinator", f"localhost:{port}", "--num-processes", str(run["num_processes"])]
    try:
        run_command(["convert", *run["arguments"], *joining, "--process-id", str(index)])
    finally:
        facts = {"steps": steps.count, "backend": xla_bridge.backends_are_initialized()}
        (files / f"facts.{index}").write_text(json.dumps(facts))


def run_all(run: dict[str, Any], first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run all processes of a run, and return how each of them ended. first: how they ended in the first run."""
    victim, fraction = run["kill"] or (None, 0)
    files, port, children = Path(tempfile.mkdtemp(prefix="jaxmoe-probe-")), free_port(), []
    for index in range(run["num_processes"]):
        if (child := os.fork()) == 0:
            last = max(1, round(fraction * first[index]["steps"])) if index == victim else None
            run_child(run, index, last, port, files)
        children.append(child)
    results = []
    for index, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = ((files / f"{name}.{index}").read_text() for name in ("out", "err"))
        facts = files / f"facts.{index}"
        more = json.loads(facts.read_text()) if facts.exists() else {}
        results.append({"code": code, "out": out, "err": without_noise(err), **more})
    shutil.rmtree(files)
    return results


def main() -> None:
    warnings.simplefilter("ignore")  # JAX's, of forking: nothing here runs on its threads
    first: list[dict[str, Any]] = []
    for run in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        ended = run_all(run, first)
        first = first or ended
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()

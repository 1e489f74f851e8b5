"""Memory of a conversion: its own account, and what the system says of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.budget import MemoryBudget

from .hf_checkpoints import write_checkpoint_dir

ROOT = Path(__file__).parent.parent.parent


def test_a_budget_is_never_exceeded():
    budget = MemoryBudget(100)
    with budget.take(60, "a"), budget.take(40, "b"):
        assert budget.peak_bytes == 100
    refused = pytest.raises(CheckpointError, match="'big' needs 101 bytes of buffers, the budget is 100")
    with refused, budget.take(101, "'big'"):
        pass


def test_memory_stays_under_the_cap(tmp_path):
    """A tensor larger than the cap, and small ones; sparse, so that the disk is spared."""
    shapes = {"large": (40 << 20,), "small.0": (1 << 20,), "small.1": (1 << 20,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * shape[0]]}
        end += 4 * shape[0]
    source = write_checkpoint_dir(tmp_path / "source", {})
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    for start, to in ((source, "orbax"), (tmp_path / "orbax", "hf")):
        command = [sys.executable, "-m", "jaxmoe", "convert", start, tmp_path / to, "--ram-gib", "0.125", "--json"]
        flags = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(part) for part in command], env=flags, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["num_bytes"] == end > 1 << 27
        assert 0 < report["buffer_bytes"] <= report["budget_bytes"] == 1 << 26
        assert report["peak_rss_bytes"] - report["rss_before_bytes"] < 1 << 27

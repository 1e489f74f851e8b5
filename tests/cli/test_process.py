"""What only a process of its own shows: a reader that leaves, a cache that cannot be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GENERATE = [sys.executable, "-m", "jaxmoe", "generate"]
OPTIONS = ["--max-tokens", "2", "--dtype", "float32", "--no-native"]


def environment(cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}


def a_prompt(tmp_path: Path) -> list[str]:
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]")
    return ["--prompt-ids", str(tmp_path / "ids.jsonl"), *OPTIONS]


def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path, tiny_dir):
    reading, writing = os.pipe()
    os.close(reading)
    command = [*GENERATE, str(tiny_dir("llama_mha")), *a_prompt(tmp_path), "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment(tmp_path))
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, tiny_dir):
    (tmp_path / "file").write_text("not a folder")
    command = [*GENERATE, str(tiny_dir("llama_mha")), *a_prompt(tmp_path)]
    done = subprocess.run(command, env=environment(tmp_path / "file"), capture_output=True, text=True)
    assert done.returncode == 0
    assert len(done.stdout.split()) == 2
    assert done.stderr.replace("\n", " ").count("compiled programs are not cached") == 1
    assert "Warning" not in done.stderr

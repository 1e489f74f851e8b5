"""Compiling without arrays gives what a loaded model's own program holds; questions that make no sense are answered in
one line; the compilers of other machines are asked in a process apart."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import psutil
import pytest

from jaxmoe.aot.compile import PHASES, abstract_runner, compile_step, held_bytes
from jaxmoe.aot.fit import CompileRequest, compile_for
from jaxmoe.errors import CheckpointError, ConfigError, MeshError
from jaxmoe.families import read_config
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.parallel.sharding import MeshPlacement

from ..conftest import mesh_of

MESH = "data=2,tensor=2,expert=2"
CASE = "qwen3_moe_sparse_step"


@pytest.mark.parametrize("layers", ["scan", pytest.param("unroll", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("phase", PHASES)
def test_a_program_without_arrays_says_what_was_planned_and_weighs_what_arrays_do(phase, layers, tiny_dir, tiny_llm):
    config = read_config(json.loads((tiny_dir(CASE) / "config.json").read_text()))
    placement = MeshPlacement(mesh=mesh_of(MESH))
    kernels = KernelConfig(layers=layers)
    runner = abstract_runner(config, placement, dtype="float32", kv_dtype=None, kernels=kernels)
    step = compile_step(runner, phase, max_num_seqs=8, context=32, page_size=8, chunk_tokens=16, decode_steps=4)
    assert step.collectives == step.planned

    llm = tiny_llm(CASE, MESH, kernels)
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in llm._runner.leaves)
    pages = llm._runner.empty_state(2, 2 * 4, 8).pages
    kv = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(pages))
    assert held_bytes(runner, max_num_seqs=8, context=32, page_size=8, chunk_tokens=32) == (weights, kv)
    assert step.total_bytes >= weights + kv + step.temp_bytes


def test_what_the_compiler_must_be_told_reaches_the_step(tiny_dir, monkeypatch):
    monkeypatch.setattr("jaxmoe.engine.runner.compiler_options", lambda mesh: {"no_such_option": "true"})
    config = read_config(json.loads((tiny_dir(CASE) / "config.json").read_text()))
    runner = abstract_runner(
        config, MeshPlacement(mesh=mesh_of(MESH)), dtype="float32", kv_dtype=None, kernels=KernelConfig(layers="scan")
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_step(runner, "decode", max_num_seqs=8, context=32, page_size=8, chunk_tokens=16, decode_steps=1)


def question(tiny_dir, **changes) -> CompileRequest:
    asked = dict(model=str(tiny_dir(CASE)), target="v5p:2x2x1", mesh="expert=2,tensor=2", max_num_seqs=4, context=64)
    return CompileRequest.of(**(asked | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (dict(model="nowhere"), CheckpointError, "config 'nowhere' is not a config.json"),
        (dict(target="z9:1x8"), ConfigError, "unknown device 'z9'"),
        (dict(mesh="tensor=8"), MeshError, "has 8 devices, target v5p:2x2x1 has 4"),
        (dict(mesh="rows=4"), MeshError, "unknown mesh axis 'rows'"),
        (dict(max_num_seqs=0), ConfigError, "max_num_seqs=0 must be a whole number of at least 1"),
        (dict(context=10**6), ConfigError, "context=1000000 must lie in"),
        (dict(chunk_tokens=0), ConfigError, "chunk_tokens=0 must be a whole number of at least 1"),
        (dict(dtype="float8"), ConfigError, "dtype='float8' must be one of"),
        (dict(kv_dtype="float8_e4m3fn"), ConfigError, "kv_dtype='float8_e4m3fn' must be one of .* fp8"),
    ],
)
def test_questions_that_make_no_sense(changes, kind, words, tiny_dir):
    with pytest.raises(kind, match=words):
        compile_for(question(tiny_dir, **changes))


def test_what_is_refused_or_has_no_room_needs_no_compiler(tiny_dir, tmp_path, monkeypatch):
    """The process apart would fail where it asks for the target's devices."""
    (tmp_path / "sitecustomize.py").write_text("import jaxmoe.aot.targets as targets; targets.topology_devices = None")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    answer = compile_for(
        CompileRequest.of(model="deepseek-v3", target="h100:1x8", mesh="expert=8", max_num_seqs=8, context=64)
    )
    assert not answer["fits"]
    assert answer["bytes"]["weights"] > answer["bytes"]["limit"]
    with pytest.raises(ConfigError, match=r"dispatch=ragged_all_to_all reaches 8 GPUs at most"):
        compile_for(question(tiny_dir, target="h200:2x8", mesh="expert=16", kernels={"dispatch": "ragged_all_to_all"}))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_where_the_one_who_asked_is_ended(how, tiny_dir, tmp_path):
    """The process apart stands where it compiles; it ends with the one that waits for it."""
    (tmp_path / "sitecustomize.py").write_text(_WAITING)
    request = question(tiny_dir).as_json()
    code = f"from jaxmoe.aot.fit import CompileRequest, compile_for; compile_for(CompileRequest.of(**{request!r}))"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    waiting = tmp_path / "waiting"
    environment = os.environ | {"PYTHONPATH": path, "JAXMOE_TEST_WAITING": str(waiting), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as asking:
        child = _when(lambda: int(waiting.read_text()) if waiting.exists() and waiting.read_text() else 0)
        asking.send_signal(how)
        asking.wait()
    assert _when(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


# In the process apart: say who it is, and wait for as long as a compiler would.
_WAITING = """
import os, sys
if "jaxmoe.aot.fit" in sys.orig_argv:
    import time
    import jaxmoe.aot.targets as targets
    def waits(target):
        with open(os.environ["JAXMOE_TEST_WAITING"], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    targets.topology_devices = waits
"""


def _when(found, seconds: float = 120):
    """What found() gives once it gives anything."""
    for _ in range(int(seconds / 0.05)):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("nothing came")


@pytest.mark.parametrize(("target", "package"), [("v5p:2x2x1", "libtpu"), ("h200:1x4", "jax_plugins.xla_cuda13")])
def test_the_targets_own_compiler_is_asked_where_it_is_installed(target, package, tiny_dir):
    parts = package.split(".")
    there = all(importlib.util.find_spec(".".join(parts[: end + 1])) for end in range(len(parts)))
    asked = question(tiny_dir, target=target)
    if not there:  # what a user without it is told
        with pytest.raises(ConfigError, match=r"pip install jaxmoe\[aot-") as caught:
            compile_for(asked)
        assert str(caught.value).count(f"target {target}") == 1
        return
    phases: list[str] = []
    answer = compile_for(asked, phases.append)
    assert answer["fits"]
    assert phases == list(PHASES)
    assert answer["bytes"]["weights"] + answer["bytes"]["kv"] <= answer["bytes"]["total"] <= answer["bytes"]["limit"]
    assert all(answer["phases"][phase]["as_planned"] for phase in PHASES)

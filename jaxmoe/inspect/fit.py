"""Does a model fit a cluster that is not there? Its steps, by the cluster's own compiler, in a process apart."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.depth import segments
from jaxmoe.engine.batch import CHUNK_TOKENS, PAGE_SIZE, TURNS
from jaxmoe.engine.llm import KV_DTYPES, check_dtypes, check_stage_chunks
from jaxmoe.errors import CheckpointError, ConfigError, MeshError
from jaxmoe.families import read_config
from jaxmoe.inspect.aot import PHASES, CompiledStep, abstract_runner, compile_step, held_bytes
from jaxmoe.inspect.targets import Target, environment, parse_target, topology_devices
from jaxmoe.layouts import DEFAULT_LAYOUT, parse_layout
from jaxmoe.mesh import build_mesh, parse_mesh
from jaxmoe.model.kernels import Kernels, choose_kernels
from jaxmoe.sharding import Placement
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_model, preset_models

# What XLA:TPU says of a step that does not fit: bytes of all it needs, arguments too, and of what a device has for it.
_NO_ROOM = re.compile(r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)(?: hbm|\))")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to compile: a config.json, a target, a mesh, and how many requests of how many tokens each.

    config: the file, a folder with it, or a preset. dtype, kv_dtype, layout, stage_chunks: as LLM.load. chunk_tokens:
    as Engine.
    """

    config: str
    target: str
    mesh: str
    batch: int
    context: int
    chunk_tokens: int = CHUNK_TOKENS
    dtype: str | None = None
    kv_dtype: str | None = None
    dispatch: str | None = None
    layout: str = str(DEFAULT_LAYOUT)
    stage_chunks: int = 1
    ignore_config_keys: tuple[str, ...] = ()

    @property
    def kernels(self) -> dict[str, Any]:
        """Those that were chosen."""
        return {} if self.dispatch is None else {"dispatch": self.dispatch}

    def checked(self) -> tuple[ModelConfig, Target, dict[str, int]]:
        """The config, target and axes.

        Raises: CheckpointError, ConfigError, LayoutError or MeshError naming the value, the limit and the remedy.
        """
        path = find_model(self.config) if self.config in preset_models() else Path(self.config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            known = ", ".join(preset_models())
            raise CheckpointError(
                f"config {self.config!r} is no config.json, no folder with one and no preset ({known})"
            )
        config = read_config(read_json(path), ignore=self.ignore_config_keys)
        check_dtypes(self.dtype or config.dtype, self.kv_dtype)
        Kernels(**self.kernels)
        target, axes = parse_target(self.target), parse_mesh(self.mesh)
        parse_layout(self.layout)
        check_stage_chunks(self.stage_chunks, stages=axes["pipeline"])
        segments(config, "scan", stages=axes["pipeline"], chunks=self.stage_chunks)
        devices = math.prod(axes.values())
        if devices != target.num_devices:
            raise MeshError(
                f"mesh {self.mesh} is of {devices} devices, target {target} has {target.num_devices}: make them equal"
            )
        most = 1 << 20
        for name, limit in (("batch", most), ("context", config.max_position_embeddings), ("chunk_tokens", most)):
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ConfigError(f"{name}={value} must lie in [1, {limit}]")
        return config, target, axes


def compile_for(question: Question, on_phase: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """What the target's compiler makes of the model's steps, as `jaxmoe compile --json` prints it.

    on_phase is told the name of each step before it is compiled. Raises: as Question.checked, and ConfigError where the
    compiler is not installed or fails.
    """
    _, target, _ = question.checked()
    command = [sys.executable, "-m", "jaxmoe.inspect.fit"]
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True,
            env=os.environ | environment(target),
        ) as child,
    ):  # fmt: skip
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(asdict(question)))
            child.stdin.close()
            for line in child.stdout:
                if not line.startswith("{"):  # whatever a plugin prints
                    continue
                said = json.loads(line)
                if "phase" in said:
                    on_phase(said["phase"])
                else:
                    result = said
            if not result:
                code = child.wait()
                complaints.seek(0)
                last = (complaints.read().splitlines() or ["nothing"])[-1][:300]
                result = {"error": f"its compiler ended with code {code}; the last it said: {last}"}
        finally:
            child.kill()
    if "error" in result:
        error = result["error"]
        raise ConfigError(error if f"target {target}" in error else f"target {target}: {error}")
    return result


def _answer(question: Question, say: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """In the process apart: compile each step."""
    config, target, axes = question.checked()
    dtype, kv_dtype = question.dtype or config.dtype, KV_DTYPES.get(question.kv_dtype or "")
    placement = Placement(
        mesh=build_mesh(axes, topology_devices(target)), layout=parse_layout(question.layout),
        chunks=question.stage_chunks,
    )  # fmt: skip
    shared_pages = placement.parts("page_token") > 1
    kernels = choose_kernels(dtype, question.kernels, platform=target.device.platform, shared_pages=shared_pages)
    runner = abstract_runner(config, placement, dtype=dtype, kv_dtype=kv_dtype, kernels=kernels)
    sizes: dict[str, Any] = dict(batch=question.batch, context=question.context, page_size=PAGE_SIZE)
    weights, kv = held_bytes(runner, **sizes)
    size: dict[str, int | None]
    size = {"weights": weights, "kv": kv, "temp": None, "total": None, "limit": target.device.hbm_bytes}
    phases: dict[str, dict[str, Any]] = {}
    answer: dict[str, Any] = {
        "target": str(target), "mesh": axes, "fits": False, "as_planned": None, "dtype": dtype,
        "kv_dtype": runner.kv_dtype, "batch": question.batch, "context": question.context,
        "chunk_tokens": question.chunk_tokens, "bytes": size, "collectives": [], "optimal_seconds": None,
        "compile_seconds": 0.0, "phases": phases,
    }  # fmt: skip
    if weights + kv > target.device.hbm_bytes:  # no program is needed to see that
        return answer
    for phase in PHASES:
        say({"phase": phase})
        try:
            step = compile_step(runner, phase, **sizes, chunk_tokens=question.chunk_tokens, turns=TURNS)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            phases[phase], size["limit"] = _no_room(str(error), weights + kv, target.device.hbm_bytes)
            break
        phases[phase] = _compiled(step, target.device.hbm_bytes)
        answer["collectives"] += _collectives(phase, step)
        answer["compile_seconds"] += step.compile_seconds
        answer["optimal_seconds"] = step.optimal_seconds if phase == "decode" else None
    temps, totals, planned = (
        [part[name] for part in phases.values()] for name in ("temp_bytes", "total_bytes", "as_planned")
    )
    size["temp"] = max((temp for temp in temps if temp is not None), default=None)
    size["total"] = None if None in totals else max(totals)
    answer["fits"] = all(part["fits"] for part in phases.values())
    answer["as_planned"] = False if False in planned else None if None in planned else True
    return answer


def _compiled(step: CompiledStep, limit: int) -> dict[str, Any]:
    return {
        "fits": step.total_bytes <= limit, "temp_bytes": step.temp_bytes, "total_bytes": step.total_bytes,
        "as_planned": step.found == step.planned, "optimal_seconds": step.optimal_seconds,
        "compile_seconds": step.compile_seconds,
    }  # fmt: skip


def _no_room(error: str, held: int, limit: int) -> tuple[dict[str, Any], int]:
    """A step its compiler found no room for, and the bytes it had: as it says where it says so, else limit."""
    temp = total = None
    if said := _NO_ROOM.search(error):
        needed, had = (
            int(float(number) * 1024 ** " KMGT".index(unit or " "))
            for number, unit in (said.group(1, 2), said.group(3, 4))
        )
        if needed > held:
            temp, total, limit = needed - held, needed, had
    part = {"fits": False, "temp_bytes": temp, "total_bytes": total, "as_planned": None}
    return part | {"error": " ".join(error.split())[:300]}, limit


def _collectives(phase: str, step: CompiledStep) -> list[dict[str, Any]]:
    """Every collective that was found in a step or planned for it, and how often each runs."""
    return [
        {"phase": phase, "op": one.op, "axes": list(one.axes), "count": step.found[one], "bytes": one.result_bytes,
         "planned": step.planned[one]}
        for one in sorted(step.found.keys() | step.planned.keys(), key=str)
    ]  # fmt: skip


def _main() -> None:
    question = json.loads(sys.stdin.read())
    question["ignore_config_keys"] = tuple(question["ignore_config_keys"])

    def say(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    try:
        say(_answer(Question(**question), say))
    except Exception as error:  # all that is known of it goes to the process that asked
        say({"error": " ".join(str(error).split())[:400]})


if __name__ == "__main__":
    _main()

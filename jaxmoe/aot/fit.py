"""Check whether a model fits a target cluster: compile its steps with the target's compiler, in a separate process."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

from jaxmoe.aot.compile import PHASES, CompiledStep, collective_rows, compile_step, held_bytes
from jaxmoe.aot.request import InspectRequest
from jaxmoe.aot.targets import CompileTarget, environment, parse_target, topology_devices
from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, build_mesh, device_platform, parse_mesh
from jaxmoe.planner.sizes import behind_windows

# Out-of-memory messages of XLA:TPU: bytes that the step needs, arguments included, and bytes available on a device.
_NO_ROOM = re.compile(r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)(?: hbm|\))")


@dataclass(frozen=True, kw_only=True)
class CompileRequest(InspectRequest):
    """Describe a model to compile ahead of time, and the target cluster."""

    target: str

    def checked(self) -> tuple[ModelConfig, CompileTarget, dict[str, int]]:
        """Return config, target and mesh axes. Raises: as checked_model; MeshError if device counts differ."""
        config, axes = self.checked_model()
        target = parse_target(self.target)
        devices = math.prod(axes.values())
        if devices != target.num_devices:
            raise MeshError(
                f"mesh {self.engine.parallel.mesh} has {devices} devices, target {target} has {target.num_devices}: "
                f"make them equal"
            )
        return config, target, axes

    def as_json(self) -> dict[str, Any]:
        """Return plain values from which CompileRequest.of makes this request again. Raises: as checked."""
        options, parallel = self.engine.options(), self.engine.parallel
        mesh, layout = parse_mesh(parallel.mesh), str(parse_layout(parallel.layout))
        plain = {"mesh": mesh, "layout": layout, "kernels": self.kernels}
        return {"model": self.model, "target": self.target} | options | plain


def compile_for(request: CompileRequest, on_phase: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """Compile the model's steps with the target's compiler and return the result that `jaxmoe compile --json` prints.

    on_phase is called with the name of each step before it is compiled. Raises: as CompileRequest.checked; ConfigError
    if the compiler is not installed or fails.
    """
    _, target, _ = request.checked()
    command = [sys.executable, "-m", "jaxmoe.aot.fit"]
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
            print(json.dumps(request.as_json()), file=child.stdin, flush=True)  # open until this process ends
            for line in child.stdout:
                if not line.startswith("{"):  # skip output of plugins
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
                result = {"error": f"its compiler ended with code {code}; its last line: {last}"}
        finally:
            child.kill()
    if "error" in result:
        error = result["error"]
        raise ConfigError(error if f"target {target}" in error else f"target {target}: {error}")
    return result


def _compile_steps(request: CompileRequest, say: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Compile each step and return the result. Runs in the separate process."""
    config, target, axes = request.checked()
    kernels = request.chosen_kernels(config, config.dtype, axes, platform=target.device.platform)
    # Refuse invalid requests, and weights and pages that do not fit, before the target's compiler starts.
    runner = request.runner(config, PlannedMesh(axes, device_platform(target.device.platform)), kernels)
    sizes = request.sizes
    weights, kv = held_bytes(runner, **sizes)
    size: dict[str, int | None]
    size = {"weights": weights, "kv": kv, "temp": None, "total": None, "limit": target.device.hbm_bytes}
    phases: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "target": str(target), "family": config.family, "mesh": axes, "layout": str(runner.placement.layout),
        "virtual_stages": runner.placement.virtual_stages,
        "dispatch": runner.kernels.dispatch, "fits": False, "as_planned": None,
        "dtype": runner.dtype, "kv_dtype": runner.kv_dtype, "max_num_seqs": sizes["max_num_seqs"],
        "context": sizes["context"],
        "chunk_tokens": sizes["chunk_tokens"], "bytes": size, "collectives": [], "optimal_seconds": None,
        "compile_seconds": 0.0, "phases": phases,
        "behind_windows": behind_windows(
            config, sizes["context"], chunk_tokens=sizes["chunk_tokens"],
            num_bytes=runner.bytes_per_token / config.num_hidden_layers,
        ),
    }  # fmt: skip
    if weights + kv > target.device.hbm_bytes:
        return result
    runner = request.runner(config, build_mesh(axes, topology_devices(target)), kernels)
    for phase in PHASES:
        say({"phase": phase})
        try:
            step = compile_step(runner, phase, **sizes, decode_steps=request.engine.decode_steps)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            phases[phase], size["limit"] = _no_room(str(error), weights + kv, target.device.hbm_bytes)
            break
        phases[phase] = _compiled(step, target.device.hbm_bytes)
        result["collectives"] += collective_rows(phase, step)
        result["compile_seconds"] += step.compile_seconds
        result["optimal_seconds"] = step.optimal_seconds if phase == "decode" else None
    temps, totals, planned = (
        [part[name] for part in phases.values()] for name in ("temp_bytes", "total_bytes", "as_planned")
    )
    size["temp"] = max((temp for temp in temps if temp is not None), default=None)
    size["total"] = None if None in totals else max(totals)
    result["fits"] = all(part["fits"] for part in phases.values())
    result["as_planned"] = False if False in planned else None if None in planned else True
    return result


def _compiled(step: CompiledStep, limit: int) -> dict[str, Any]:
    return {
        "fits": step.total_bytes <= limit, "temp_bytes": step.temp_bytes, "total_bytes": step.total_bytes,
        "as_planned": step.collectives == step.planned, "scatter_padding": step.scatter_padding,
        "optimal_seconds": step.optimal_seconds, "compile_seconds": step.compile_seconds,
    }  # fmt: skip


def _no_room(error: str, held: int, limit: int) -> tuple[dict[str, Any], int]:
    """Describe a step that ran out of memory, and return the bytes available: from the message, else limit."""
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


def _end_with_stdin() -> None:
    """Exit when standard input closes, which means that the parent process has ended in any way."""
    sys.stdin.read()
    os._exit(1)


def _main() -> None:
    request = json.loads(sys.stdin.readline())
    Thread(target=_end_with_stdin, daemon=True).start()

    def say(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    try:
        say(_compile_steps(CompileRequest.of(**request), say))
    except Exception as error:  # report any error to the parent process
        say({"error": " ".join(str(error).split())[:400]})


if __name__ == "__main__":
    _main()

"""Does a model fit a cluster that is not there? Its steps, by the cluster's own compiler, in a process apart."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.families import read_config
from jaxmoe.inspect.targets import Target, environment, parse_target, topology_devices
from jaxmoe.mesh import parse_mesh
from jaxmoe.weights.checkpoint import read_json

PAGE_SIZE, CHUNK_TOKENS, BLOCK_TOKENS = 16, 2048, 128


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to compile: a config.json, a target, a mesh, and how many requests of how many tokens each."""

    config: str
    target: str
    mesh: str
    batch: int
    context: int
    dtype: str | None = None
    kv_dtype: str | None = None
    dispatch: str | None = None
    ignore_config_keys: tuple[str, ...] = ()

    def checked(self) -> tuple[ModelConfig, Target, dict[str, int]]:
        """The config, target and axes. Raises: ConfigError or MeshError naming the value, the limit and the remedy."""
        path = Path(self.config)
        path = path / "config.json" if path.is_dir() else path
        config = read_config(read_json(path), ignore=self.ignore_config_keys)
        target, axes = parse_target(self.target), parse_mesh(self.mesh)
        devices = math.prod(axes.values())
        if devices != target.num_devices:
            raise MeshError(
                f"mesh {self.mesh} is of {devices} devices, target {target} has {target.num_devices}: make them equal"
            )
        for name, limit in (("batch", 1 << 20), ("context", config.max_position_embeddings)):
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ConfigError(f"{name}={value} must lie in [1, {limit}]")
        return config, target, axes


def compile_for(question: Question, on_phase: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """What the target's compiler makes of the model's steps, as `jaxmoe compile --json` prints it.

    on_phase is told the name of each step before it is compiled. Raises: ConfigError or MeshError for what cannot be
    asked, or where the compiler is not installed or fails.
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
        raise ConfigError(f"target {target}: {result['error']}")
    return result


def _answer(question: Question, say: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """In the process apart: compile each step."""
    from jaxmoe.inspect.aot import PHASES, abstract_runner, compile_step, held_bytes
    from jaxmoe.mesh import build_mesh
    from jaxmoe.model.kernels import Kernels
    from jaxmoe.sharding import Placement

    config, target, axes = question.checked()
    limit = target.device.hbm_bytes
    named = {"dispatch": question.dispatch} if question.dispatch else {}
    kernels = Kernels(**named, **({"grouped": "ragged"} if target.device.platform == "tpu" else {}))  # type: ignore[arg-type]
    placement = Placement(mesh=build_mesh(axes, topology_devices(target)))
    runner = abstract_runner(
        config, placement, dtype=question.dtype or config.dtype, kv_dtype=question.kv_dtype, kernels=kernels
    )
    sizes: dict[str, Any] = dict(batch=question.batch, context=question.context, page_size=PAGE_SIZE)
    weights, kv = held_bytes(runner, **sizes)
    answer: dict[str, Any] = {
        "target": str(target), "mesh": axes, "fits": False, "dtype": runner.dtype, "kv_dtype": runner.kv_dtype,
        "batch": question.batch, "context": question.context,
        "bytes": {"weights": weights, "kv": kv, "temp": None, "total": weights + kv, "limit": limit},
        "collectives": [], "optimal_seconds": None, "compile_seconds": 0.0, "phases": {},
    }  # fmt: skip
    if weights + kv > limit:  # no program is needed to see that
        return answer
    for phase in PHASES:
        say({"phase": phase})
        try:
            step = compile_step(runner, phase, **sizes, chunk_tokens=CHUNK_TOKENS, block_tokens=BLOCK_TOKENS)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            answer["phases"][phase] = {"fits": False, "error": " ".join(str(error).split())[:300]}
            return answer
        found = [
            {"phase": phase, "op": one.op, "axes": list(one.axes), "count": count, "bytes": one.result_bytes,
             "planned": step.planned.get(one, 0)}
            for one, count in sorted(step.found.items(), key=str)
        ]  # fmt: skip
        answer["phases"][phase] = {
            "fits": step.total_bytes <= limit, "temp_bytes": step.temp_bytes, "total_bytes": step.total_bytes,
            "as_planned": step.found == step.planned, "optimal_seconds": step.optimal_seconds,
            "compile_seconds": step.compile_seconds,
        }  # fmt: skip
        answer["collectives"] += found
        answer["compile_seconds"] += step.compile_seconds
        answer["optimal_seconds"] = step.optimal_seconds  # of decode, the last
    done = answer["phases"].values()
    answer["bytes"]["temp"] = max(part["temp_bytes"] for part in done)
    answer["bytes"]["total"] = max(part["total_bytes"] for part in done)
    answer["fits"] = all(part["fits"] for part in done)
    return answer


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

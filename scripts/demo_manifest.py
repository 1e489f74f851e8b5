"""manifest.json: inputs and results of a training run, so that anyone can reproduce a checkpoint and compare."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.parallel.mesh import describe
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.train.loop import TrainResult
from jaxmoe.train.recipe import TrainingRecipe
from scripts.demo_export import file_facts, write_json

MANIFEST = "manifest.json"
REPRODUCED_WITHIN = 0.02
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Return the versions of Python and packages, and the machine type."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "num_cpu_cores": os.cpu_count(),
    }


def manifest_of(
    directory: Path,
    *,
    recipe: TrainingRecipe,
    corpus: dict[str, object],
    placement: MeshPlacement,
    result: TrainResult,
    num_parameters: int,
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the manifest of a checkpoint written to directory. Its evaluation loss is that of the exported weights."""
    return {
        "name": "demo",
        "command": "python -m scripts.train_demo --out checkpoints/demo",
        "data": corpus,
        "recipe": dataclasses.asdict(recipe),
        "num_parameters": num_parameters,
        "held_out": dataclasses.asdict(result.held_out),
        "training": {
            "num_tokens_seen": result.num_tokens,
            "last_loss_nats_per_token": result.loss_nats_per_token,
            "last_balance_loss": result.balance,
            "wall_s": round(result.wall_s, 1),
            "cpu_s": round(result.cpu_s, 1),
            "mesh": describe(placement.mesh),
            "environment": environment(),
        },
        "samples": samples,
        "files": file_facts(directory),
        "reproduced": [],
    }


def record_reproduction(directory: Path, result: TrainResult, placement: MeshPlacement) -> float:
    """Add another run of the recipe to the manifest in directory.

    Returns the relative difference of its evaluation loss per byte. The loss is compared per byte, not per token,
    because another Python version has other sources and thus another tokenizer.
    Raises: CheckpointError if directory has no manifest.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: pass a checkpoint written by scripts/train_demo")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    stated = manifest["held_out"]["nats_per_byte"]
    distance = result.held_out.nats_per_byte / stated - 1
    manifest["reproduced"].append(
        {
            "held_out": dataclasses.asdict(result.held_out),
            "relative_difference": distance,
            "within": REPRODUCED_WITHIN,
            "wall_s": round(result.wall_s, 1),
            "cpu_s": round(result.cpu_s, 1),
            "mesh": describe(placement.mesh),
            "environment": environment(),
        }
    )
    write_json(path, manifest)
    return distance

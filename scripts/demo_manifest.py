"""manifest.json: what a checkpoint was made from and what came out, so that anyone can make it again and compare."""

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
from jaxmoe.parallel.sharding import Placement
from jaxmoe.train.loop import TrainResult
from jaxmoe.train.recipe import Recipe
from scripts.demo_export import file_facts, write_json

MANIFEST = "manifest.json"
REPRODUCED_WITHIN = 0.02
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Python, packages and the kind of machine a run had."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "num_cpu_cores": os.cpu_count(),
    }


def manifest_of(
    directory: Path,
    *,
    recipe: Recipe,
    corpus: dict[str, object],
    placement: Placement,
    result: TrainResult,
    num_parameters: int,
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """The manifest of a checkpoint written to directory; its held-out loss is that of the weights as written."""
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


def record_reproduction(directory: Path, result: TrainResult, placement: Placement) -> float:
    """Add a second run of the recipe to the manifest in directory; the relative distance of its held-out loss a byte.

    A byte, since another Python has other text and so another tokenizer. Raises: CheckpointError without a manifest.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: give a checkpoint made by scripts/train_demo")
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

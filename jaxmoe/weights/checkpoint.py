"""A checkpoint directory as Hugging Face publishes it: config.json and one or several .safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.manifest import MANIFEST, read_manifest
from jaxmoe.weights.safetensors_file import TensorInfo, read_header
from jaxmoe.weights.store import CHECKPOINT, TREE, open_store

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; {} where it is absent and not required. Raises: CheckpointError."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}: give a Hugging Face checkpoint directory")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def read_config_json(path: Path) -> dict[str, Any]:
    """A config.json; with the quantization_config that NVIDIA's checkpoints have in a hf_quant_config.json beside it.

    Raises: CheckpointError.
    """
    raw, beside = read_json(path), path.parent / "hf_quant_config.json"
    if path.name == "config.json" and "quantization_config" not in raw and beside.is_file():
        how = read_json(beside).get("quantization")
        raw["quantization_config"] = {"quant_method": "modelopt"} | (how if isinstance(how, dict) else {})
    return raw


def open_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a published or converted checkpoint by name, headers checked, nothing read yet.

    Raises: CheckpointError naming missing files, or tensors the index promises and the files lack.
    """
    manifest = read_manifest(directory)
    if manifest is not None and manifest.kind == "orbax":
        return open_store(directory, manifest)
    if manifest is None:
        _refuse_others(directory)
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{directory / INDEX} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
    else:
        weight_map, names = {}, [SINGLE]
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{INDEX} names files outside its directory: {outside[:4]}")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:8])}"
        )
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for key, info in read_header(directory / name).items():
            if key in tensors:
                raise CheckpointError(f"tensor {key!r} stands in both {tensors[key].path.name} and {name}: remove one")
            tensors[key] = info
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{INDEX} names {len(absent)} tensors the files lack: {', '.join(absent[:8])}")
    return tensors


def _refuse_others(directory: Path) -> None:
    """Raise a CheckpointError for what is an Orbax checkpoint but not a whole one of ours, and for pickles alone."""
    if any((directory / name).exists() for name in (TREE, CHECKPOINT)):
        raise CheckpointError(
            f"{directory} is an Orbax checkpoint without {MANIFEST}: unfinished, or not written by jaxmoe convert; "
            f"convert the published checkpoint"
        )
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return
    if pickles := sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES):
        raise CheckpointError(
            f"{directory} has pickled weights alone ({', '.join(pickles[:4])}), which can hold code and are never "
            f"loaded: have them saved as safetensors"
        )

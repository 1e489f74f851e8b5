"""Reading a Hugging Face checkpoint directory: config.json and one or several .safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.errors import CheckpointError, MissingWeightsError, listed
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG
from jaxmoe.weights.manifest import MANIFEST, CheckpointManifest, read_manifest
from jaxmoe.weights.safetensors_file import TensorInfo, read_header
from jaxmoe.weights.store import CHECKPOINT, TREE, open_store
from jaxmoe.weights.symlinks import check_symlink

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIG, BESIDE = "config.json", "hf_quant_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a JSON object from a file; return {} if the file is absent and not required.

    If a config.json has no quantization_config, it gets that of NVIDIA's hf_quant_config.json in the same directory.
    Raises: CheckpointError for an unreadable file, and if one of these two files is a link out of its directory.
    """
    value = _read_object(path, required=required)
    if path.name == CONFIG and QUANTIZATION_CONFIG not in value and (beside := path.with_name(BESIDE)).is_file():
        how = _read_object(beside, required=True).get("quantization")
        value[QUANTIZATION_CONFIG] = {"quant_method": "modelopt"} | (how if isinstance(how, dict) else {})
    return value


def _read_object(path: Path, *, required: bool) -> dict[str, Any]:
    if path.name in (CONFIG, BESIDE):
        check_symlink(path.parent, path)
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}: give a Hugging Face checkpoint directory")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, but must hold an object")
    return value


def open_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Open all tensors of a published or converted checkpoint, by name. Only headers are read and checked.

    Raises: CheckpointError naming links that leave the directory, or differences between the index and the files; its
    subclass MissingWeightsError if there are no weights, or files are missing.
    """
    manifest = read_manifest(directory)
    tensors = open_converted(directory, manifest) if manifest is not None else _open_hf(directory)
    if not tensors:
        raise CheckpointError(f"{directory} holds no tensors: fetch it again")
    return tensors


def open_converted(directory: Path, manifest: CheckpointManifest, *, whole: bool = True) -> dict[str, TensorInfo]:
    """Open the tensors of the files that a manifest lists; ignore all other files. whole: see open_store.

    Raises: CheckpointError, also if a header differs from the manifest.
    """
    if manifest.kind == "orbax":
        return open_store(directory, manifest, whole=whole)
    tensors = _open_shards(directory, sorted(name for name in manifest.files if name.endswith(".safetensors")))
    actual = {name: (tensor.dtype_name, tensor.shape) for name, tensor in tensors.items()}
    written = {name: (entry.spec.dtype, entry.spec.shape) for name, entry in manifest.tensors.items()}
    if others := sorted(name for name in actual.keys() | written.keys() if actual.get(name) != written.get(name)):
        raise CheckpointError(
            f"{directory} has headers of {len(others)} tensors that differ from its {MANIFEST}: {listed(others)}; "
            f"convert again or fetch it again"
        )
    return tensors


def _open_hf(directory: Path) -> dict[str, TensorInfo]:
    """Open the tensors of the files that an index names, or of the single file."""
    _refuse_others(directory)
    if not (directory / INDEX).is_file():
        return _open_shards(directory, [SINGLE])
    check_symlink(directory, directory / INDEX)
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / INDEX} has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    if outside := [name[:80] for name in names if Path(name).name != name]:
        raise CheckpointError(f"{INDEX} names files outside its directory: {outside[:4]}")
    tensors = _open_shards(directory, names)
    _check_index(directory, weight_map, tensors)
    return tensors


def _open_shards(directory: Path, names: list[str]) -> dict[str, TensorInfo]:
    if missing := [name[:80] for name in names if not os.path.isfile(directory / name)]:
        raise MissingWeightsError(f"{directory} lacks {len(missing)} of {len(names)} weight files: {listed(missing)}")
    for name in names:
        check_symlink(directory, directory / name)
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for key, info in read_header(directory / name).items():
            if key in tensors:
                raise CheckpointError(f"tensor {key!r} is in both {tensors[key].path.name} and {name}: remove one")
            tensors[key] = info
    return tensors


def _check_index(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError if an index differs from its files, or if SINGLE exists and the index does not name it."""
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{INDEX} names {len(absent)} tensors that the files lack: {listed(absent)}")
    if unnamed := sorted(set(tensors) - set(weight_map)):
        raise CheckpointError(f"{INDEX} omits {len(unnamed)} tensors of its files: {listed(unnamed)}; fetch both again")
    if strayed := [key for key, name in weight_map.items() if tensors[key].path.name != name]:
        said, actual = weight_map[strayed[0]], tensors[strayed[0]].path.name
        raise CheckpointError(
            f"{INDEX} names the wrong files for {len(strayed)} tensors: {strayed[0]!r} is not in {listed([said])}, "
            f"but in {listed([actual])}; fetch both again"
        )
    if SINGLE not in weight_map.values() and os.path.lexists(directory / SINGLE):
        raise CheckpointError(f"{directory} has both {SINGLE} and {INDEX}, which does not name it: remove one")


def _refuse_others(directory: Path) -> None:
    """Raise MissingWeightsError for an Orbax checkpoint without our manifest, and for a checkpoint of pickles only."""
    if any((directory / name).exists() for name in (TREE, CHECKPOINT)):
        raise MissingWeightsError(
            f"{directory} is an Orbax checkpoint without {MANIFEST}: unfinished, or not written by jaxmoe convert; "
            f"convert the published checkpoint"
        )
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return
    if pickles := sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES):
        raise MissingWeightsError(
            f"{directory} has only pickled weights ({', '.join(pickles[:4])}), which can run code and are never "
            f"loaded: save them as safetensors"
        )

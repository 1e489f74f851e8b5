"""A checkpoint directory as Hugging Face publishes it: config.json and one or several .safetensors files."""

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
    """A JSON object from a file; {} where it is absent and not required. A config.json has the quantization_config that
    NVIDIA's checkpoints have in a hf_quant_config.json beside it.

    Raises: CheckpointError, also where either of those two is a link that leaves its directory.
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
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def open_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a published or converted checkpoint by name, headers checked, nothing read yet.

    Raises: CheckpointError naming links that leave the directory, or where index and files differ; its subclass
    MissingWeightsError where there are no weights, or files are missing.
    """
    manifest = read_manifest(directory)
    tensors = open_converted(directory, manifest) if manifest is not None else _open_hf(directory)
    if not tensors:
        raise CheckpointError(f"{directory} holds no tensors: fetch it again")
    return tensors


def open_converted(directory: Path, manifest: CheckpointManifest, *, whole: bool = True) -> dict[str, TensorInfo]:
    """The tensors of the files that a manifest lists, whatever lies beside those. whole: see open_store.

    Raises: CheckpointError, also where headers say anything else than the manifest.
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
    """The tensors of the files that an index names, or of the only file."""
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
                raise CheckpointError(f"tensor {key!r} stands in both {tensors[key].path.name} and {name}: remove one")
            tensors[key] = info
    return tensors


def _check_index(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise a CheckpointError where an index and the files that it names differ, or where it names others than SINGLE,
    which stands beside it."""
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{INDEX} names {len(absent)} tensors the files lack: {listed(absent)}")
    if unnamed := sorted(set(tensors) - set(weight_map)):
        raise CheckpointError(
            f"{INDEX} leaves out {len(unnamed)} tensors that its files hold: {listed(unnamed)}; fetch both again"
        )
    if strayed := [key for key, name in weight_map.items() if tensors[key].path.name != name]:
        said, actual = weight_map[strayed[0]], tensors[strayed[0]].path.name
        raise CheckpointError(
            f"{INDEX} looks for {len(strayed)} tensors in the wrong files: {strayed[0]!r} in {listed([said])}, "
            f"it lies in {listed([actual])}; fetch both again"
        )
    if SINGLE not in weight_map.values() and os.path.lexists(directory / SINGLE):
        raise CheckpointError(f"{directory} has both {SINGLE} and {INDEX}, which does not name it: remove one")


def _refuse_others(directory: Path) -> None:
    """Raise a MissingWeightsError for what is an Orbax checkpoint but not a whole one of ours, and for pickles
    alone."""
    if any((directory / name).exists() for name in (TREE, CHECKPOINT)):
        raise MissingWeightsError(
            f"{directory} is an Orbax checkpoint without {MANIFEST}: unfinished, or not written by jaxmoe convert; "
            f"convert the published checkpoint"
        )
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return
    if pickles := sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES):
        raise MissingWeightsError(
            f"{directory} has pickled weights alone ({', '.join(pickles[:4])}), which can hold code and are never "
            f"loaded: have them saved as safetensors"
        )

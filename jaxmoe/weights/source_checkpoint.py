"""The source of a conversion: all checks of the source checkpoint, made before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.families import FAMILIES, check_other_keys, read_config, read_quantization_config, without_quantization
from jaxmoe.parallel.mesh import AXES
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.parallel.stages import layer_segments
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG
from jaxmoe.weights.checkpoint import CONFIG, INDEX, open_tensors, read_json
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.load import assign_weight_slices
from jaxmoe.weights.manifest import CHAT_TEMPLATES, MANIFEST, CheckpointManifest, check_name, read_manifest
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.store import CHECKPOINT, TREE
from jaxmoe.weights.stored import as_stored
from jaxmoe.weights.symlinks import check_symlink

# Suffixes of the files to copy, which are neither weights nor code.
_TRAVEL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_LICENSES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_STAY = (INDEX, MANIFEST, TREE, CHECKPOINT, "commit_success.txt")


@dataclass(frozen=True, kw_only=True)
class SourceCheckpoint:
    """Describe a checked source checkpoint.

    kind: "hf" or "orbax". side_files: files that are copied along. left_behind: files that are not copied.
    config_check: the result of comparing shapes with config.json, or the reason why they were not compared.
    """

    directory: Path
    kind: str
    manifest: CheckpointManifest | None
    tensors: Mapping[str, TensorInfo]
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    config_check: str

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def summary(self) -> str:
        """Return the size of the source, and a hash of headers, config and manifest. Copies have the same summary."""
        headers = [(spec.name, spec.dtype, spec.shape, self.tensors[spec.name].start) for spec in self.specs.values()]
        digest = hashlib.sha256(json.dumps([headers, self.config], sort_keys=True).encode())
        digest.update(b"" if self.manifest is None else self.manifest.dump())
        return f"{len(headers)} tensors of {self.num_bytes} bytes with headers {digest.hexdigest()[:12]}"

    def fingerprint(self) -> str:
        """Return a hash that changes if a file changes.

        It covers names, sizes, inodes, the times of modification and status change, and headers. Copying a file cannot
        preserve its time of status change.
        """
        digest = hashlib.sha256()
        paths = {self.directory / name for name in (*self.side_files, *([MANIFEST] if self.manifest else []))}
        for path in {tensor.path for tensor in self.tensors.values()}:
            paths |= set(path.iterdir()) if path.is_dir() else {path}
        for path in sorted(paths):
            status = os.stat(path)
            what = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
            digest.update(json.dumps([str(path.relative_to(self.directory)), what]).encode())
        for name in sorted(self.specs):
            tensor = self.tensors[name]
            spec = self.specs[name]
            digest.update(json.dumps([name, spec.dtype, spec.shape, tensor.path.name, tensor.start]).encode())
        return digest.hexdigest()


def open_source_checkpoint(
    directory: Path, *, ignore_config_keys: Iterable[str] = (), check_config: bool = True
) -> SourceCheckpoint:  # fmt: skip
    """Open and check a source checkpoint.

    Raises: CheckpointError or ConfigError naming a missing, truncated, contradictory, unknown or unsafe item.
    """
    ignore = [ignore_config_keys] if isinstance(ignore_config_keys, str) else list(ignore_config_keys)
    files = sorted(path for path in directory.iterdir() if not path.is_dir())
    for path in files:
        check_symlink(directory, path)
    config = read_json(directory / CONFIG)
    manifest = read_manifest(directory)
    tensors = open_tensors(directory)
    specs = {}
    for name, tensor in tensors.items():
        specs[name] = spec = TensorSpec(name=check_name(name), dtype=tensor.dtype_name, shape=tensor.shape)
        if spec.num_bytes != tensor.num_bytes:
            raise CheckpointError(
                f"{tensor.path.name}: tensor {name!r} of shape {list(spec.shape)} and dtype {spec.dtype} needs "
                f"{spec.num_bytes} bytes, has {tensor.num_bytes}: fetch it again"
            )
    names = {path.name for path in files} | {MANIFEST, INDEX, CHAT_TEMPLATES}
    if both := sorted(names & set(tensors)):
        raise CheckpointError(f"tensor name {both[0]!r} is also the name of a file next to it: rename the tensor")
    side, left = _side_files(directory, files, {tensor.path.name for tensor in tensors.values()})
    return SourceCheckpoint(
        directory=directory, kind=manifest.kind if manifest else "hf", manifest=manifest, tensors=tensors, specs=specs,
        config=config, side_files=side, left_behind=left,
        config_check=config_check(directory, tensors, config, ignore) if check_config else "not checked",
    )  # fmt: skip


def _side_files(directory: Path, files: list[Path], read: Container[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files to copy along (configs, tokenizers, licenses), and all other entries that are not read."""
    travel = [str(path.relative_to(directory)) for path in _chat_templates(directory)]
    not_read = [path.name for path in directory.iterdir() if path.is_dir() and path.name not in read]
    stay = [f"{name}/" for name in not_read if not (travel and name == CHAT_TEMPLATES)]
    for path in files:
        if path.name in _STAY or path.name in read:
            continue
        known = path.suffix.lower() in _TRAVEL or path.name.upper().startswith(_LICENSES)
        (travel if known and path.name[0] != "." and path.is_file() else stay).append(path.name)
    return tuple(travel), tuple(sorted(stay))


def _chat_templates(directory: Path) -> list[Path]:
    """Return the template files of CHAT_TEMPLATES. Raises: CheckpointError for a link that leaves the directory."""
    paths = sorted((directory / CHAT_TEMPLATES).glob("*.jinja"))
    for path in (directory / CHAT_TEMPLATES, *paths):
        check_symlink(directory, path)
    return [path for path in paths if path.is_file() and path.name[0] != "."]


def config_check(
    directory: Path, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any], ignore: Iterable[str] = ()
) -> str:
    """Compare shapes with config.json; return "shapes agree", or the reason why they were not compared.

    Raises: CheckpointError if shapes differ; ConfigError for an invalid config, apart from its quantization.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        return f"not checked: model_type {str(family)[:40]!r} is not supported"
    try:
        read_quantization_config(raw.get(QUANTIZATION_CONFIG))
        check_other_keys(raw)
    except ConfigError as error:  # conversion copies the bits of unknown quantization formats
        read_config(without_quantization(raw), ignore=ignore)
        return f"not checked: {error}"
    config = as_stored(read_config(raw, ignore=ignore), tensors, raw, compare=False)
    alone = AbstractMesh((1,) * len(AXES), AXES)
    segments = layer_segments(config, "unroll")
    sizes = segment_sizes(config, MeshPlacement(mesh=alone), segments)  # type: ignore[arg-type]
    assign_weight_slices(directory, tensors, config, sizes, segments)
    return "shapes agree"

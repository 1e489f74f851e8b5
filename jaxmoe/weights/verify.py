"""Verifying a converted checkpoint against its manifest: every byte of every written file.

Joined processes may share the work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.checkpoint import PICKLES, open_converted
from jaxmoe.weights.division import ALONE, WorkDivision
from jaxmoe.weights.manifest import MANIFEST, READ_BYTES, CheckpointManifest, read_manifest, sum_file
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.store import array_problems

_MAX_WORKERS = 8


def sum_tensor(
    tensor: TensorInfo, on_bytes: Callable[[int], None] = lambda num_bytes: None, step_bytes: int = READ_BYTES
) -> str:  # fmt: skip
    """Return the sha256 of a tensor, read step_bytes at a time. Raises: CheckpointError if its bytes end early."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(step_bytes, tensor.num_bytes)))
    for start in range(0, tensor.num_bytes, step_bytes):
        part = buffer[: min(step_bytes, tensor.num_bytes - start)]
        tensor.read_bytes(start, part)
        digest.update(part)
        on_bytes(len(part))
    return digest.hexdigest()


def problems(
    directory: Path, on_progress: Callable[[int, int], None] = lambda done, total: None,
    division: WorkDivision = ALONE,
) -> list[str]:  # fmt: skip
    """Return one line for each difference from the manifest, naming the tensor or file; empty if there is none.

    division: each of its processes checks a part and reports its progress, and process 0 returns the lines of all.
    Raises: CheckpointError if the manifest is missing or corrupt.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: only checkpoints written by jaxmoe convert can be verified"
        )
    errors: list[str] = []
    if division.is_first:
        errors += (problem for name in manifest.files for problem in _file_problems(directory, name, manifest))
        errors += _strays(directory, manifest)
    sizes = {name: entry.spec.num_bytes for name, entry in manifest.tensors.items()}
    own = division.own(sizes)
    try:
        tensors, missing = open_converted(directory, manifest, whole=False), None
    except CheckpointError as error:
        own, tensors, missing = set(), {}, str(error)
    total, done = sum(sizes[name] for name in own), 0

    def check(name: str) -> list[str]:
        return list(_tensor_problems(directory, name, manifest, tensors))

    on_progress(done, total)
    names, lines = [name for name in sizes if name in own], list[str]()
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as workers:
        for name, problem_lines in zip(names, workers.map(check, names), strict=True):
            lines += problem_lines
            done += sizes[name]
            on_progress(done, total)
    parts = division.collect(missing=missing, lines=lines)  # parts are consecutive runs of the manifest
    if unopened := [part["missing"] for part in parts if part["missing"] is not None]:
        return [*errors, unopened[0]]
    return errors + [line for part in parts for line in part["lines"]]


def check_whole(
    directory: Path, on_progress: Callable[[int, int], None] = lambda done, total: None,
    division: WorkDivision = ALONE,
) -> None:  # fmt: skip
    """Raise CheckpointError naming the differences from the manifest, if there are any. division: see problems."""
    if errors := problems(directory, on_progress, division):
        raise CheckpointError(in_words(directory, errors))


def in_words(directory: Path, errors: list[str]) -> str:
    """Return the message that reports problems in one line."""
    more = f"; and {len(errors) - 8} more" if len(errors) > 8 else ""
    return f"{directory} is corrupt: {'; '.join(errors[:8])}{more}; convert again or fetch it again"


def _strays(directory: Path, manifest: CheckpointManifest) -> Iterator[str]:
    """Yield a problem for each extra file that a loader may mistake for weights or an index of the checkpoint."""
    for path in sorted(directory.iterdir()):
        weights = path.suffix in (".safetensors", *PICKLES) or path.name.endswith(".index.json")
        if weights and path.name not in manifest.files and path.name not in manifest.tensors:
            yield f"file {path.name} is not in the manifest: remove it"


def _file_problems(directory: Path, name: str, manifest: CheckpointManifest) -> Iterator[str]:
    entry, path = manifest.files[name], directory / name
    try:
        if (num_bytes := path.stat().st_size) != entry.num_bytes:
            yield f"file {name} has {num_bytes} bytes instead of {entry.num_bytes}"
        elif sum_file(path, entry.head_bytes) != entry:
            yield f"file {name} differs from its checksum"
    except OSError as error:
        yield f"file {name}: {error.strerror}"


def _tensor_problems(
    directory: Path, name: str, manifest: CheckpointManifest, tensors: Mapping[str, TensorInfo]
) -> Iterator[str]:  # fmt: skip
    entry = manifest.tensors[name]
    if manifest.kind == "orbax" and (errors := list(array_problems(directory, name, manifest))):
        yield from errors
        return
    try:
        if sum_tensor(tensors[name]) != entry.sha256:
            yield f"tensor {name!r} differs from its checksum"
    except CheckpointError as error:
        yield f"tensor {name!r}: {error}"

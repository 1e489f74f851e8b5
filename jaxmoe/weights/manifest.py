"""The manifest of a converted checkpoint: checksums of every tensor, of every file, and of the manifest itself.

It is written last, so that a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.safetensors_file import read_exactly
from jaxmoe.weights.symlinks import check_symlink

MANIFEST = "jaxmoe_manifest.json"
JOURNAL = "jaxmoe_journal.jsonl"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of templates that are copied along
KINDS = ("orbax", "hf")
READ_BYTES = 4 << 20
_VERSION = 1
_SUM = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_BYTES = 240  # leaves room for suffixes of file names


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Describe a tensor.

    sha256: checksum of its numbers in C order, little-endian, regardless of how files store them. chunk: the chunk
    shape of its Orbax array.
    """

    spec: TensorSpec
    sha256: str
    chunk: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Describe a file of num_bytes bytes.

    sha256: checksum of its first head_bytes bytes. These are the header of a .safetensors file, else the whole file.
    """

    num_bytes: int
    head_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """Hold all entries of a manifest. kind: "orbax" or "hf". options: the options of the conversion."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]

    def dump(self) -> bytes:
        """Serialize the manifest deterministically, so that any change of the file is detected."""
        body: dict[str, Any] = {"jaxmoe_manifest": _VERSION, "kind": self.kind, "options": dict(self.options)}
        body["files"] = {name: [entry.num_bytes, entry.head_bytes, entry.sha256] for name, entry in self.files.items()}
        body["tensors"] = {
            name: {"dtype": entry.spec.dtype, "shape": entry.spec.shape, "sha256": entry.sha256}
            | ({} if entry.chunk is None else {"chunk": entry.chunk})
            for name, entry in self.tensors.items()
        }
        text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
        body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return (json.dumps(body, ensure_ascii=True, separators=(",", ":")) + "\n").encode()


def check_name(name: str) -> str:
    """Return the name if it is a valid folder name. Raises: CheckpointError for one that could leave the directory."""
    bad = "/" in name or "\\" in name or "\0" in name or name[:1] in ("", ".", "_")
    if bad or len(name.encode(errors="replace")) > _MAX_NAME_BYTES or not name.isprintable():
        raise CheckpointError(
            f"tensor name {name[:80]!r} cannot be a folder name: it must be printable, of 1 to {_MAX_NAME_BYTES} "
            f"bytes, without slashes and not begin with a dot or an underscore; rename the tensor"
        )
    return name


def read_manifest(directory: Path) -> CheckpointManifest | None:
    """Read the manifest of a directory; return None if there is no manifest.

    Raises: CheckpointError if the manifest is corrupt, or a link that leaves the directory.
    """
    path = directory / MANIFEST
    check_symlink(directory, path)
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        body = json.loads(content)
        if isinstance(body, dict) and type(version := body.get("jaxmoe_manifest")) is int and version > _VERSION:
            raise CheckpointError(f"{path} is of version {version}, this jaxmoe reads {_VERSION}: update jaxmoe")
        manifest = _parse(body)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError) and MANIFEST in str(error):
            raise
        raise _changed(path) from error
    if manifest.dump() != content:
        raise _changed(path)
    return manifest


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not as jaxmoe convert wrote it: corrupt; convert again or fetch it again")


def _parse(body: Any) -> CheckpointManifest:
    if body["jaxmoe_manifest"] != _VERSION or body["kind"] not in KINDS:
        raise ValueError(body["kind"])
    tensors, files = {}, {}
    for name, entry in body["tensors"].items():
        chunk = _sizes(entry["chunk"], least=1) if "chunk" in entry else None
        spec = TensorSpec(name=check_name(name), dtype=entry["dtype"], shape=_sizes(entry["shape"]))
        if (body["kind"] == "orbax") != (chunk is not None) or (chunk is not None and len(chunk) != len(spec.shape)):
            raise ValueError(name)
        tensors[name] = TensorEntry(spec=spec, sha256=_sum(entry["sha256"]), chunk=chunk)
    for name, (num_bytes, head_bytes, digest) in body["files"].items():
        if Path(alone := name.removeprefix(f"{CHAT_TEMPLATES}/")).name != alone or not alone:
            raise ValueError(name)
        (total, head) = _sizes([num_bytes, head_bytes])
        files[name] = FileEntry(num_bytes=total, head_bytes=head, sha256=_sum(digest))
    return CheckpointManifest(kind=body["kind"], options=dict(body["options"]), tensors=tensors, files=files)


def _sizes(values: Any, *, least: int = 0) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= least for value in values):
        raise ValueError(values)
    return tuple(values)


def _sum(value: Any) -> str:
    if not isinstance(value, str) or not _SUM.fullmatch(value):
        raise ValueError(value)
    return value


def sum_file(path: Path, head_bytes: int | None = None) -> FileEntry:
    """Return the entry of a file, with the checksum of its first head_bytes bytes (default: all).

    Raises: CheckpointError if the file ends earlier.
    """
    num_bytes = path.stat().st_size
    head = num_bytes if head_bytes is None else head_bytes
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_BYTES, head)))
    for start in range(0, head, READ_BYTES):
        part = buffer[: min(READ_BYTES, head - start)]
        read_exactly(path, start, part, "its checksummed part")
        digest.update(part)
    return FileEntry(num_bytes=num_bytes, head_bytes=head, sha256=digest.hexdigest())

"""Writing a Hugging Face checkpoint: .safetensors files of about 5 GB and an index."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxmoe.weights.checkpoint import INDEX, SINGLE
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.manifest import FileEntry, sum_file
from jaxmoe.weights.safetensors_file import TensorInfo, read_header
from jaxmoe.weights.writing import write_all

SHARD_BYTES = 5_000_000_000
UNFINISHED = ".unfinished"  # suffix of files with missing tensors


@dataclass
class _ShardFile:
    """Describe the tensors of one file. The widest dtypes come first, so that all tensors are aligned."""

    specs: list[TensorSpec] = field(default_factory=list)
    name: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """Return the bytes of the file before its tensors, and the byte offset of each tensor by name."""
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, starts = 0, {}
        for spec in self.specs:
            starts[spec.name] = end
            fields[spec.name] = {
                "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.num_bytes],
            }  # fmt: skip
            end += spec.num_bytes
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + start for name, start in starts.items()}


def _plan(specs: Mapping[str, TensorSpec], limit: int) -> list[_ShardFile]:
    shards = [_ShardFile()]
    filled = 0
    for spec in specs.values():
        if shards[-1].specs and filled + spec.num_bytes > limit:
            shards.append(_ShardFile())
            filled = 0
        shards[-1].specs.append(spec)
        filled += spec.num_bytes
    for number, shard in enumerate(shards, 1):
        shard.specs.sort(key=lambda spec: -spec.itemsize)
        shard.name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


class _RangeWriter:
    """Write a tensor's bytes, in order, to its byte range of a file.

    lock: lets one thread at a time write to the file. The kernel serializes these writes anyway, and waiting threads
    would spin.
    """

    def __init__(self, path: Path, start: int, lock: threading.Lock) -> None:
        self._lock = lock
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
        self._file.seek(start)

    def append(self, part: memoryview) -> None:
        """Write the next bytes."""
        with self._lock:
            write_all(self._file, part)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ShardSink:
    """Write converted tensors to .safetensors files of at most `limit` bytes (or one tensor each)."""

    kind = "hf"

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], limit: int = SHARD_BYTES) -> None:
        self._directory, self._specs = directory, specs
        self._shards = _plan(specs, limit)
        self._starts: dict[str, tuple[_ShardFile, int]] = {}
        for shard in self._shards:
            for name, start in shard.header()[1].items():
                self._starts[name] = shard, start
        self.chunks: Mapping[str, tuple[int, ...] | None] = dict.fromkeys(specs)

    def disk_bytes(self) -> int:
        """Return the disk space of the checkpoint in bytes."""
        return sum(len(shard.header()[0]) + shard.num_bytes for shard in self._shards) + 256 * len(self._specs)

    def num_files(self) -> int:
        """Return the number of files, including an index."""
        return len(self._shards) + 1

    def _path(self, shard: _ShardFile) -> Path:
        unfinished = self._unfinished(shard)
        return unfinished if unfinished.exists() else self._directory / shard.name

    def _unfinished(self, shard: _ShardFile) -> Path:
        return self._directory / (shard.name + UNFINISHED)

    def create(self) -> None:
        """Create files of the final size, with headers, under names with the suffix UNFINISHED."""
        for shard in self._shards:
            head, _ = shard.header()
            path = self._path(shard)
            if path.exists() and path.stat().st_size == len(head) + shard.num_bytes:
                continue
            with self._unfinished(shard).open("wb") as file:
                file.write(head)
                file.truncate(len(head) + shard.num_bytes)

    def place(self, name: str) -> tuple[str, int]:
        """Return the file of a tensor and its first byte in that file."""
        shard, start = self._starts[name]
        return shard.name, start

    def writer(self, name: str) -> _RangeWriter:
        """Return a writer that takes the bytes of a tensor in order."""
        shard, start = self._starts[name]
        return _RangeWriter(self._path(shard), start, shard.lock)

    def written(self, name: str) -> TensorInfo:
        """Return a finished tensor for reading."""
        shard, start = self._starts[name]
        head = len(shard.header()[0])
        spec = self._specs[name]
        offsets = [start - head, start - head + spec.num_bytes]
        entry = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        return TensorInfo(self._path(shard), name, entry, head, shard.num_bytes)

    def finish(self) -> dict[str, FileEntry]:
        """Rename the files, write an index if there are several files, and return the files' entries."""
        entries = {}
        for shard in self._shards:
            path = self._path(shard)
            head, _ = shard.header()
            with path.open("r+b") as file:  # an earlier run may have been killed before it wrote the header
                file.write(head)
            path = path.rename(self._directory / shard.name)
            read_header(path)
            entries[shard.name] = sum_file(path, len(head))
        if len(self._shards) > 1:
            weight_map = {spec.name: shard.name for shard in self._shards for spec in shard.specs}
            total = sum(shard.num_bytes for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            entries[INDEX] = sum_file(self._directory / INDEX)
        return entries

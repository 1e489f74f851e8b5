"""An Orbax checkpoint on disk: the published tensors under their published names, each an array cut into chunk files.

Orbax's form without OCDBT: a folder a tensor, with .zarray (zarr version 2) and a file a chunk; here without
compression, so that a chunk file is a run of the tensor's bytes in C order, and reading or writing a part of it takes
no more memory than that part. _METADATA lists the names. Why so: docs/decisions/0010-orbax-holds-published-tensors.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from jaxmoe.errors import CheckpointError, MissingWeightsError, listed
from jaxmoe.weights.dtypes import DTYPES, TensorSpec
from jaxmoe.weights.manifest import CheckpointManifest, FileEntry, check_name, sum_file
from jaxmoe.weights.safetensors_file import TensorInfo, read_exactly
from jaxmoe.weights.symlinks import check_symlink
from jaxmoe.weights.writing import write_all

ZARRAY, TREE, CHECKPOINT = ".zarray", "_METADATA", "_CHECKPOINT_METADATA"
CHUNK_BYTES = 32 << 20
_MIN_CHUNK_BYTES = 1 << 20  # into which a mesh's share is cut
_MAX_DIMS = 32  # numpy's before version 2; names of chunks have a number for each
_BLOCK_BYTES = 4096  # a file system's


class ByteRun(NamedTuple):
    """Neighboring bytes of a tensor in one chunk file: name of the file, first byte in it, how many."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ChunkGrid:
    """How a tensor is cut: chunk is 1 along the first dims, any extent along one, whole along the rest."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    itemsize: int

    def __post_init__(self) -> None:
        rest = self._cut + 1
        if 0 not in self.shape and self.chunk[rest:] != self.shape[rest:]:
            raise CheckpointError(f"chunks of {list(self.chunk)} cut {list(self.shape)} along more than one dim")

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk file; the last along the cut dim is filled up with zeros."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def _cut(self) -> int:
        """The dim that is cut: the first where a chunk is longer than 1, or the last."""
        longer = (dim for dim, extent in enumerate(self.chunk) if extent > 1)
        return next(longer, max(0, len(self.chunk) - 1))

    def runs(self, start: int, stop: int) -> Iterator[ByteRun]:
        """The bytes start..stop of the tensor, in order."""
        if not self.shape:
            yield ByteRun("0", start, stop - start)
            return
        cut = self._cut
        row_bytes = math.prod(self.shape[cut + 1 :]) * self.itemsize
        line_bytes = self.shape[cut] * row_bytes  # of all chunks along the cut dim
        while start < stop:
            line, within = divmod(start, line_bytes)
            number, first = divmod(within, self.chunk[cut] * row_bytes)
            num_bytes = min(stop - start, self.chunk_bytes - first, line_bytes - within)
            yield ByteRun(self._file(line, number, cut), first, num_bytes)
            start += num_bytes

    def _file(self, line: int, number: int, cut: int) -> str:
        index = [number]
        for extent in reversed(self.shape[:cut]):
            line, place = divmod(line, extent)
            index.insert(0, place)
        return ".".join(str(place) for place in (*index, *(0 for _ in self.shape[cut + 1 :])))

    def files(self) -> Iterator[ByteRun]:
        """Every chunk file, with the bytes of the tensor in it (start is 0)."""
        at, total = 0, math.prod(self.shape) * self.itemsize
        while at < total:
            run = next(self.runs(at, min(total, at + self.chunk_bytes)))
            yield run
            at += run.num_bytes


def choose_chunk(spec: TensorSpec, num_shares: int = 1, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Extents of a chunk of at most `limit` bytes (or one number).

    Where the first dim divides into num_shares, no chunk lies in two shares, so that a process which holds some of them
    reads whole chunks. Chunks divide what they cut if that makes none smaller than a MiB.
    """
    cut = 0
    while cut < len(spec.shape) - 1 and math.prod(spec.shape[cut + 1 :]) * spec.itemsize > limit:
        cut += 1
    if not spec.shape or 0 in spec.shape:
        return tuple(max(1, extent) for extent in spec.shape)
    row_bytes = math.prod(spec.shape[cut + 1 :]) * spec.itemsize
    extent = spec.shape[cut]
    share = extent // num_shares if cut == 0 and extent % num_shares == 0 else extent
    if share * row_bytes < _MIN_CHUNK_BYTES:
        share = extent
    least = -(-share // max(1, limit // row_bytes))
    exact = next((share // n for n in range(least, share + 1) if share % n == 0), 1)
    rows = exact if exact * row_bytes >= min(_MIN_CHUNK_BYTES, share * row_bytes) else -(-share // least)
    return (*(1 for _ in spec.shape[:cut]), max(1, rows), *spec.shape[cut + 1 :])


class StoredTensor(TensorInfo):
    """A tensor of an Orbax checkpoint, read as one of a .safetensors file is."""

    def __init__(self, folder: Path, spec: TensorSpec, chunk: tuple[int, ...]) -> None:
        self.path, self.name, self.shape, self.dtype_name = folder, spec.name, spec.shape, spec.dtype
        self.start, self.num_bytes = 0, spec.num_bytes
        self.grid = ChunkGrid(shape=spec.shape, chunk=chunk, itemsize=spec.itemsize)

    def read_bytes(self, start: int, out: memoryview) -> None:
        """Fill out with the tensor's bytes from its byte `start` on. Raises: CheckpointError if a chunk ends early."""
        done, first = 0, self.start + start
        for run in self.grid.runs(first, first + len(out)):
            read_exactly(self.path / run.file, run.start, out[done : done + run.num_bytes], f"tensor {self.name!r}")
            done += run.num_bytes


def open_store(directory: Path, manifest: CheckpointManifest, *, whole: bool = True) -> dict[str, TensorInfo]:
    """All tensors of an Orbax checkpoint by name; nothing read yet. whole: whether each must have its chunks, of the
    right sizes.

    Raises: CheckpointError naming chunks that are not right, or links that leave the directory; MissingWeightsError
    naming folders it lacks, or chunks where no other fault is found.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, entry in manifest.tensors.items():
        assert entry.chunk is not None
        tensors[name] = StoredTensor(directory / name, entry.spec, entry.chunk)
    if missing := [name for name in tensors if not (directory / name / ZARRAY).is_file()]:
        raise MissingWeightsError(f"{directory} lacks {len(missing)} of {len(tensors)} tensors: {listed(missing)}")
    wrong: list[str] = []
    is_damaged = False  # rather than incomplete
    for name, tensor in tensors.items():
        check_symlink(directory, directory / name)
        sizes = {}
        with os.scandir(directory / name) as inside:
            for file in inside:
                if file.is_symlink():
                    check_symlink(directory, Path(file.path))
                if whole:
                    sizes[file.name] = file.stat().st_size
        num_bytes = tensor.grid.chunk_bytes
        if whole and any(sizes.get(run.file) != num_bytes for run in tensor.grid.files()):
            wrong.append(name)
            is_damaged |= any(sizes.get(run.file, num_bytes) != num_bytes for run in tensor.grid.files())
    if wrong:
        raise (CheckpointError if is_damaged else MissingWeightsError)(
            f"{directory} lacks chunks of {len(wrong)} tensors, or they are not as long as written: {listed(wrong)}; "
            f"convert again or fetch it again"
        )
    return {**tensors}


def array_metadata(spec: TensorSpec, chunk: tuple[int, ...]) -> bytes:
    """The .zarray of a tensor."""
    fields: dict[str, object] = {
        "chunks": chunk, "compressor": None, "dimension_separator": ".", "dtype": DTYPES[spec.dtype].zarr,
        "fill_value": None, "filters": None, "order": "C", "shape": spec.shape, "zarr_format": 2,
    }  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode()


def tree_metadata(names: Iterable[str]) -> bytes:
    """The _METADATA of a flat tree of arrays."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    fields = {
        "tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }  # fmt: skip
    return json.dumps(fields).encode()


def checkpoint_metadata() -> bytes:
    """The _CHECKPOINT_METADATA, without times: the same conversion gives the same bytes."""
    fields: dict[str, object] = {
        "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
        "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": None, "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }  # fmt: skip
    return json.dumps(fields).encode()


class _ChunkWriter:
    """Takes a tensor's bytes in order."""

    def __init__(self, folder: Path, spec: TensorSpec, grid: ChunkGrid) -> None:
        folder.mkdir(exist_ok=True)
        (folder / ZARRAY).write_bytes(array_metadata(spec, grid.chunk))
        self._folder, self._grid, self._done = folder, grid, 0
        self._file: IO[bytes] | None = None

    def append(self, part: memoryview) -> None:
        """The next bytes."""
        done = 0
        for run in self._grid.runs(self._done, self._done + len(part)):
            if run.start == 0:
                self.close()
                self._file = open(self._folder / run.file, "wb", buffering=0)  # noqa: SIM115
            assert self._file is not None
            write_all(self._file, part[done : done + run.num_bytes])
            done += run.num_bytes
        self._done += done

    def close(self) -> None:
        """Fill the last chunk up."""
        if self._file is not None:
            with self._file as file:
                if file.tell() < self._grid.chunk_bytes:
                    file.truncate(self._grid.chunk_bytes)
            self._file = None


class StoreSink:
    """Where converted tensors become an Orbax checkpoint. num_shares: see choose_chunk."""

    kind = "orbax"

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], num_shares: int) -> None:
        self._directory, self._specs = directory, specs
        for spec in specs.values():
            if len(spec.shape) > _MAX_DIMS:
                raise CheckpointError(
                    f"tensor {spec.name!r} has {len(spec.shape)} dims, an orbax checkpoint's may have {_MAX_DIMS}: "
                    f"convert with --to hf"
                )
        self.chunks: Mapping[str, tuple[int, ...] | None] = {
            check_name(name): choose_chunk(spec, num_shares) for name, spec in specs.items()
        }

    def disk_bytes(self) -> int:
        """What it takes on a disk, folders and ends of blocks among it."""
        total = _BLOCK_BYTES * 2
        for name in self._specs:
            grid = self._grid(name)
            num_files = sum(1 for _ in grid.files())
            total += 2 * _BLOCK_BYTES + num_files * (-(-grid.chunk_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        return total

    def num_files(self) -> int:
        """Files and folders of it."""
        return 2 + sum(2 + sum(1 for _ in self._grid(name).files()) for name in self._specs)

    def _grid(self, name: str) -> ChunkGrid:
        spec, chunk = self._specs[name], self.chunks[name]
        assert chunk is not None
        return ChunkGrid(shape=spec.shape, chunk=chunk, itemsize=spec.itemsize)

    def create(self) -> None:
        """Nothing: folders come with their tensors."""

    def place(self, name: str) -> tuple[str, int]:
        """Nowhere in particular: every tensor has files of its own."""
        return "", 0

    def writer(self, name: str) -> _ChunkWriter:
        """Takes the bytes of a tensor, from its beginning."""
        return _ChunkWriter(self._directory / name, self._specs[name], self._grid(name))

    def written(self, name: str) -> TensorInfo:
        """A finished tensor."""
        return StoredTensor(self._directory / name, self._specs[name], self._grid(name).chunk)

    def finish(self) -> dict[str, FileEntry]:
        """Write what makes the folders a checkpoint; the files' entries."""
        contents = {TREE: tree_metadata(self._specs), CHECKPOINT: checkpoint_metadata()}
        for name, content in contents.items():
            (self._directory / name).write_bytes(content)
        return {name: sum_file(self._directory / name) for name in contents}


def array_problems(directory: Path, name: str, manifest: CheckpointManifest) -> Iterator[str]:
    """What is wrong with a tensor's folder apart from its numbers: .zarray, sizes of chunks, what fills them up."""
    entry = manifest.tensors[name]
    assert entry.chunk is not None
    grid = ChunkGrid(shape=entry.spec.shape, chunk=entry.chunk, itemsize=entry.spec.itemsize)
    try:
        if (directory / name / ZARRAY).read_bytes() != array_metadata(entry.spec, entry.chunk):
            yield f"tensor {name!r}: {name}/{ZARRAY} is not as written"
        for run in grid.files():
            path = directory / name / run.file
            if (num_bytes := os.stat(path).st_size) != grid.chunk_bytes:
                yield f"tensor {name!r}: {name}/{run.file} has {num_bytes} bytes instead of {grid.chunk_bytes}"
            elif run.num_bytes < grid.chunk_bytes and not _is_zero(path, run.num_bytes, grid.chunk_bytes):
                yield f"tensor {name!r}: {name}/{run.file} is not filled up with zeros"
    except OSError as error:
        yield f"tensor {name!r}: {name}/{Path(error.filename or '').name}: {error.strerror}"


def _is_zero(path: Path, start: int, stop: int) -> bool:
    rest = bytearray(stop - start)
    read_exactly(path, start, memoryview(rest), "what fills it up")
    return not any(rest)

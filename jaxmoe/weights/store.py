"""Orbax checkpoints on disk: the published tensors under their published names, each stored in chunk files.

This is Orbax's format without OCDBT: one folder per tensor, with .zarray (zarr version 2) and one file per chunk. The
chunks are not compressed. So a chunk file is a run of the tensor's bytes in C order, and reading or writing a part of
it takes no more memory than that part. _METADATA lists the names. The reasons:
docs/decisions/0010-orbax-holds-published-tensors.md.
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
_MIN_CHUNK_BYTES = 1 << 20  # chunks are not made smaller than this to fit shares or to divide evenly
_MAX_DIMS = 32  # limit of numpy before version 2; chunk names have one number per dim
_BLOCK_BYTES = 4096  # block size of a file system


class ByteRun(NamedTuple):
    """Describe contiguous bytes of a tensor in one chunk file: file name, first byte in the file, and count."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ChunkGrid:
    """Map bytes of a tensor to chunk files.

    chunk: extents of a chunk: 1 along the first dims, any extent along the next (the cut dim), complete along the rest.
    Raises: CheckpointError for any other chunk.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    itemsize: int

    def __post_init__(self) -> None:
        rest = self._cut + 1
        if 0 not in self.shape and self.chunk[rest:] != self.shape[rest:]:
            raise CheckpointError(f"chunks of {list(self.chunk)} cut {list(self.shape)} along more than one dim")

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of every chunk file; the last chunk along the cut dim is padded with zeros."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def _cut(self) -> int:
        """Return the cut dim: the first along which a chunk is longer than 1, or the last dim."""
        longer = (dim for dim, extent in enumerate(self.chunk) if extent > 1)
        return next(longer, max(0, len(self.chunk) - 1))

    def runs(self, start: int, stop: int) -> Iterator[ByteRun]:
        """Yield the runs that hold the bytes start..stop of the tensor, in order."""
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
        """Yield every chunk file, as the run of the tensor's bytes in it (start is 0)."""
        at, total = 0, math.prod(self.shape) * self.itemsize
        while at < total:
            run = next(self.runs(at, min(total, at + self.chunk_bytes)))
            yield run
            at += run.num_bytes


def choose_chunk(spec: TensorSpec, num_shares: int = 1, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Return the extents of a chunk of at most `limit` bytes (or one number).

    If num_shares divides the first dim, no chunk crosses a share, so that a process that loads some of the shares reads
    whole chunks. Chunks divide the share (or the dim) evenly unless that makes them smaller than 1 MiB.
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
    """Read a tensor of an Orbax checkpoint through the interface of .safetensors tensors."""

    def __init__(self, folder: Path, spec: TensorSpec, chunk: tuple[int, ...]) -> None:
        self.path, self.name, self.shape, self.dtype_name = folder, spec.name, spec.shape, spec.dtype
        self.start, self.num_bytes = 0, spec.num_bytes
        self.grid = ChunkGrid(shape=spec.shape, chunk=chunk, itemsize=spec.itemsize)

    def read_bytes(self, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `start` on. Raises: CheckpointError if a chunk ends early."""
        done, first = 0, self.start + start
        for run in self.grid.runs(first, first + len(out)):
            read_exactly(self.path / run.file, run.start, out[done : done + run.num_bytes], f"tensor {self.name!r}")
            done += run.num_bytes


def open_store(directory: Path, manifest: CheckpointManifest, *, whole: bool = True) -> dict[str, TensorInfo]:
    """Open all tensors of an Orbax checkpoint, by name, without reading them.

    whole: check that each tensor has all chunks, of the right sizes.
    Raises: CheckpointError naming tensors with chunks of a wrong size, or links that leave the directory;
    MissingWeightsError naming missing folders, or tensors with missing chunks if there is no other fault.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, entry in manifest.tensors.items():
        assert entry.chunk is not None
        tensors[name] = StoredTensor(directory / name, entry.spec, entry.chunk)
    if missing := [name for name in tensors if not (directory / name / ZARRAY).is_file()]:
        raise MissingWeightsError(f"{directory} lacks {len(missing)} of {len(tensors)} tensors: {listed(missing)}")
    wrong: list[str] = []
    is_damaged = False  # True: some chunk has a wrong size. False: chunks are only missing.
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
            f"{directory} has missing chunks, or chunks of a wrong size, in {len(wrong)} tensors: {listed(wrong)}; "
            f"convert again or fetch it again"
        )
    return {**tensors}


def array_metadata(spec: TensorSpec, chunk: tuple[int, ...]) -> bytes:
    """Return the content of a tensor's .zarray."""
    fields: dict[str, object] = {
        "chunks": chunk, "compressor": None, "dimension_separator": ".", "dtype": DTYPES[spec.dtype].zarr,
        "fill_value": None, "filters": None, "order": "C", "shape": spec.shape, "zarr_format": 2,
    }  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode()


def tree_metadata(names: Iterable[str]) -> bytes:
    """Return the content of _METADATA for a flat tree of arrays."""
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
    """Return the content of _CHECKPOINT_METADATA, without times: the same conversion gives the same bytes."""
    fields: dict[str, object] = {
        "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
        "metrics": {}, "performance_metrics": {}, "init_timestamp_nsecs": None, "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }  # fmt: skip
    return json.dumps(fields).encode()


class _ChunkWriter:
    """Write a tensor's bytes, in order, to its chunk files."""

    def __init__(self, folder: Path, spec: TensorSpec, grid: ChunkGrid) -> None:
        folder.mkdir(exist_ok=True)
        (folder / ZARRAY).write_bytes(array_metadata(spec, grid.chunk))
        self._folder, self._grid, self._done = folder, grid, 0
        self._file: IO[bytes] | None = None

    def append(self, part: memoryview) -> None:
        """Write the next bytes."""
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
        """Pad the last chunk with zeros and close it."""
        if self._file is not None:
            with self._file as file:
                if file.tell() < self._grid.chunk_bytes:
                    file.truncate(self._grid.chunk_bytes)
            self._file = None


class StoreSink:
    """Write converted tensors to an Orbax checkpoint. num_shares: see choose_chunk."""

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
        """Return the disk space of the checkpoint in bytes, including folders and partly filled blocks."""
        total = _BLOCK_BYTES * 2
        for name in self._specs:
            grid = self._grid(name)
            num_files = sum(1 for _ in grid.files())
            total += 2 * _BLOCK_BYTES + num_files * (-(-grid.chunk_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        return total

    def num_files(self) -> int:
        """Return the number of files and folders."""
        return 2 + sum(2 + sum(1 for _ in self._grid(name).files()) for name in self._specs)

    def _grid(self, name: str) -> ChunkGrid:
        spec, chunk = self._specs[name], self.chunks[name]
        assert chunk is not None
        return ChunkGrid(shape=spec.shape, chunk=chunk, itemsize=spec.itemsize)

    def create(self) -> None:
        """Do nothing: the writer of a tensor creates its folder."""

    def place(self, name: str) -> tuple[str, int]:
        """Return a constant: every tensor has its own files, so the order does not matter."""
        return "", 0

    def writer(self, name: str) -> _ChunkWriter:
        """Return a writer that takes the bytes of a tensor in order."""
        return _ChunkWriter(self._directory / name, self._specs[name], self._grid(name))

    def written(self, name: str) -> TensorInfo:
        """Return a finished tensor for reading."""
        return StoredTensor(self._directory / name, self._specs[name], self._grid(name).chunk)

    def finish(self) -> dict[str, FileEntry]:
        """Write the metadata of the checkpoint and return the entries of these files."""
        contents = {TREE: tree_metadata(self._specs), CHECKPOINT: checkpoint_metadata()}
        for name, content in contents.items():
            (self._directory / name).write_bytes(content)
        return {name: sum_file(self._directory / name) for name in contents}


def array_problems(directory: Path, name: str, manifest: CheckpointManifest) -> Iterator[str]:
    """Yield problems of a tensor's folder other than its numbers: .zarray, sizes of chunks, and padding."""
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
                yield f"tensor {name!r}: {name}/{run.file} is not padded with zeros"
    except OSError as error:
        yield f"tensor {name!r}: {name}/{Path(error.filename or '').name}: {error.strerror}"


def _is_zero(path: Path, start: int, stop: int) -> bool:
    rest = bytearray(stop - start)
    read_exactly(path, start, memoryview(rest), "its zero padding")
    return not any(rest)

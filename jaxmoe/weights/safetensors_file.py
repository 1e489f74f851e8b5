"""Reading tensors of one .safetensors file by rows, without mapping the file into memory.

The safetensors library maps whole files, so that every page read counts as memory of this process. Here each read is a
pread into its own buffer, which limits the memory to the requested rows. The complete header is checked first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FLOATS = tuple(_DTYPES)
_DTYPES |= {  # numbers of quantized tensors, and their scales
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo:
    """Describe one tensor of a file: name, dtype, shape and byte range."""

    def __init__(self, path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> None:
        def bad(why: str) -> CheckpointError:
            return CheckpointError(f"{path.name}: tensor {name!r} {why}; the file is corrupt: fetch it again")

        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise bad("has no dtype, shape or data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not lists or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
            raise bad(f"has shape {shape} and data_offsets {offsets}, which are not lists of whole numbers")
        if offsets[0] > offsets[1] or offsets[1] > data_bytes:
            raise bad(f"has bytes {offsets[0]}..{offsets[1]} of {data_bytes}")
        self.path, self.name, self.shape, self.dtype_name = path, name, tuple(shape), str(entry["dtype"])
        self.start = data_start + offsets[0]
        self.num_bytes = offsets[1] - offsets[0]
        if dtype := _DTYPES.get(self.dtype_name):
            expected = math.prod(shape) * dtype.itemsize
            if expected != self.num_bytes:
                raise bad(f"of shape {shape} and dtype {self.dtype_name} needs {expected} bytes, has {self.num_bytes}")

    @property
    def dtype(self) -> np.dtype:
        """Return the numpy dtype. Raises: CheckpointError for an unsupported dtype."""
        self.check_dtype(tuple(_DTYPES))
        return _DTYPES[self.dtype_name]

    def check_dtype(self, allowed: Collection[str] = FLOATS, *, why: str = "") -> None:
        """Raise CheckpointError unless the dtype is one of those allowed: floating point by default."""
        if self.dtype_name not in allowed:
            raise CheckpointError(
                f"{self.path.name}: tensor {self.name!r} has dtype {self.dtype_name}; use {', '.join(allowed)}{why}"
            )

    def at(self, index: int) -> TensorInfo:
        """Return one entry of the first dim as a tensor."""
        part = copy(self)
        part.shape, part.num_bytes = self.shape[1:], self.num_bytes // self.shape[0]
        part.start = self.start + index * part.num_bytes
        return part

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows start..stop of the first dim into a new array. Raises: CheckpointError if the file ends early."""
        row_items = math.prod(self.shape[1:])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.read_bytes(start * row_items * self.dtype.itemsize, memoryview(out.reshape(-1).view(np.uint8)))
        return out

    def read_columns(self, start: int, stop: int, low: int, high: int) -> np.ndarray:
        """Read columns low..high of rows start..stop of a matrix into a new array, without the bytes between them.

        Raises: CheckpointError if the file ends early.
        """
        (_, width), itemsize = self.shape, self.dtype.itemsize
        out = np.empty((stop - start, high - low), self.dtype)
        rows = out.view(np.uint8).reshape(stop - start, -1)
        what = f"tensor {self.name!r}"
        with opened(self.path) as file:
            for row, place in zip(rows, range(start, stop), strict=True):
                read_into(file, self.path, self.start + (place * width + low) * itemsize, memoryview(row), what)
        return out

    def read_bytes(self, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `start` on. Raises: CheckpointError if the file ends early."""
        read_exactly(self.path, self.start + start, out, f"tensor {self.name!r}")


def read_exactly(path: Path, start: int, out: memoryview, what: str) -> None:
    """Fill `out` from a file, from byte `start` on. Raises: CheckpointError if it ends early or cannot be read."""
    with opened(path) as file:
        read_into(file, path, start, out, what)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading; yield its descriptor. Raises: CheckpointError if it cannot be opened or read."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def read_into(descriptor: int, path: Path, start: int, out: memoryview, what: str) -> None:
    """Fill `out` from an open file, from byte `start` on. Raises: CheckpointError if it ends early."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done : done + (1 << 28)]], start + done)
        if count == 0:
            raise CheckpointError(f"{path.name} ended inside {what}: fetch it again")
        done += count


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a file; return its tensors by name. Raises: CheckpointError if it is truncated or invalid."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path.name} has {size} bytes and a header length of {length}: truncated or not safetensors; "
                    f"fetch it again"
                )
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path.name} has a header that is not JSON: truncated or corrupt; fetch it again ({error})"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has a header that is not a JSON object: corrupt; fetch it again")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: TensorInfo(path, name, entry, data_start, size - data_start) for name, entry in header.items()}
    _check_layout(path, tensors.values(), data_start, size)
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Check that the tensors fill the file end to end, as the format requires.

    Raises: CheckpointError for a gap or an overlap.
    """
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path.name}: tensor {tensor.name!r} begins at byte {tensor.start} and {before} ends at {end}: "
                f"corrupt; fetch it again"
            )
        end, before = tensor.start + tensor.num_bytes, f"tensor {tensor.name!r}"
    if end != size:
        raise CheckpointError(f"{path.name}: {before} ends at byte {end} of {size}: corrupt; fetch it again")

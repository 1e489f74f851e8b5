"""Every dtype a published tensor may have: its name in safetensors, in numpy, and in an Orbax checkpoint's arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class StoredDtype:
    """One dtype. zarr: what an array's .zarray calls it; bytes lie in little-endian order."""

    name: str
    numpy: np.dtype
    zarr: str


def _ml(name: str, numpy_name: str) -> StoredDtype:
    return StoredDtype(name=name, numpy=np.dtype(getattr(ml_dtypes, numpy_name)), zarr=numpy_name)


def _plain(name: str, code: str) -> StoredDtype:
    return StoredDtype(name=name, numpy=np.dtype(code), zarr=code)


DTYPES: dict[str, StoredDtype] = {
    dtype.name: dtype
    for dtype in (
        _plain("F64", "<f8"), _plain("F32", "<f4"), _plain("F16", "<f2"), _ml("BF16", "bfloat16"),
        _plain("I64", "<i8"), _plain("I32", "<i4"), _plain("I16", "<i2"), _plain("I8", "|i1"),
        _plain("U64", "<u8"), _plain("U32", "<u4"), _plain("U16", "<u2"), _plain("U8", "|u1"),
        _plain("BOOL", "|b1"),
        _ml("F8_E4M3", "float8_e4m3fn"), _ml("F8_E5M2", "float8_e5m2"), _ml("F8_E8M0", "float8_e8m0fnu"),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of a tensor. Raises: CheckpointError for a dtype that is not in the table."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError(f"tensor {self.name!r} has dtype {self.dtype}; what can be held: {', '.join(DTYPES)}")

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].numpy.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * self.itemsize

"""The dtypes of checkpoint tensors: their names in safetensors, in numpy, and in the arrays of an Orbax checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class StoredDtype:
    """Describe one dtype, stored in little-endian order. zarr: its name in the .zarray of an array."""

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

# The floating-point dtypes that models run in: safetensors name to user-facing name.
FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Describe a tensor by name, dtype and shape. Raises: CheckpointError for a dtype that DTYPES does not have."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError(f"tensor {self.name!r} has dtype {self.dtype}; supported: {', '.join(DTYPES)}")

    @property
    def itemsize(self) -> int:
        """Return the bytes of one number."""
        return DTYPES[self.dtype].numpy.itemsize

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the tensor."""
        return math.prod(self.shape) * self.itemsize


def check_reach(name: str, numbers: np.ndarray, to: np.dtype, remedy: str) -> None:
    """Raise CheckpointError with a remedy if a finite number of a tensor would become infinite in the dtype `to`."""
    number = _first_beyond(numbers, to)
    if number is not None:
        raise beyond_reach(name, number, to.name, remedy)


def beyond_reach(name: str, number: float, dtype: str, remedy: str) -> CheckpointError:
    """Return the error for a tensor with a number that is too large for a dtype."""
    return CheckpointError(f"tensor {name!r} holds {number:.4g}, outside the range of {dtype}: {remedy}")


def _first_beyond(numbers: np.ndarray, to: np.dtype) -> float | None:
    """Return the first finite number that would be infinite in another dtype; None if there is none.

    The two passes compare bit patterns as integers, which takes far less time than a cast.
    """
    limit = _reach(numbers.dtype, to)
    if limit is None or numbers.size == 0:
        return None
    bits = numbers.view(f"u{numbers.itemsize}")
    sign = 1 << (8 * numbers.itemsize - 1)
    if numbers.view(f"i{numbers.itemsize}").max() <= limit and bits.max() <= sign | limit:
        return None
    beyond = (bits & bits.dtype.type(sign - 1) > limit) & np.isfinite(numbers)
    return float(numbers[beyond][0]) if beyond.any() else None


@cache
def _reach(numbers: np.dtype, to: np.dtype) -> int | None:
    """Return the bits of the largest number of a dtype that stays finite in another; None if all finite ones do."""
    floats = [DTYPES[name].numpy for name in FLOAT_NAMES]
    if numbers == to or numbers not in floats or to not in floats:
        return None
    whole = np.dtype(f"u{numbers.itemsize}")

    def finite(bits: int) -> bool:
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.array([bits], whole).view(numbers).astype(to))[0])

    low, high = 0, int(np.array([ml_dtypes.finfo(numbers).max], numbers).view(whole)[0])
    if finite(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(middle) else (low, middle)
    return low

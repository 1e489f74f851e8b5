"""Tensors that files do not hold as they are wanted: numbers and scales of a published format, dequantised values, and
plain matrices quantised. All are read by rows of their first dim, as those of files are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.formats import Format
from jaxmoe.ops.quantize import LARGEST

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BYTE_VALUES = np.stack([np.concatenate([_E2M1, -_E2M1])[np.arange(256) >> shift & 15] for shift in (0, 4)], axis=-1)


class Tensor(Protocol):
    """A tensor of a file, or one made of such: path and start say where its bytes begin."""

    path: Path
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that are read."""
        ...

    @property
    def num_bytes(self) -> int:
        """What all rows take in memory while they are read."""
        ...

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first dim."""
        ...


class _Made:
    """What tensors made of one of a file share. shape: of the last two dims are [out, in]."""

    def __init__(self, source: Tensor, shape: tuple[int, ...], dtype: Any) -> None:
        self.source, self.shape, self.dtype = source, shape, np.dtype(dtype)
        self.path, self.start = source.path, source.start

    @property
    def num_bytes(self) -> int:
        """Of float32, which values pass through."""
        return math.prod(self.shape) * 4


class Reshaped(_Made):
    """The same numbers in the same order, in other dims after the first; swapped: and the last two of them exchanged,
    which of tensors of two dims would not leave rows."""

    def __init__(self, source: Tensor, shape: tuple[int, ...], *, swapped: bool = False) -> None:
        super().__init__(source, (*shape[:-2], shape[-1], shape[-2]) if swapped else shape, source.dtype)
        self._inside, self._swapped = shape[1:], swapped

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first dim."""
        rows = self.source.read_rows(start, stop).reshape(stop - start, *self._inside)
        return rows.swapaxes(-1, -2) if self._swapped else rows


class Bits(_Made):
    """The bits of numbers of eight of them."""

    def __init__(self, source: Tensor) -> None:
        super().__init__(source, source.shape, np.uint8)

    @property
    def num_bytes(self) -> int:
        """What the rows take that they come from."""
        return self.source.num_bytes

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first dim."""
        return self.source.read_rows(start, stop).view(np.uint8)


class Cells(_Made):
    """Published scales [..., rows, columns] at the blocks of a parameter: each cell has its block's scale.

    outputs, inputs: of a published block (inputs None: all); high, wide: of a cell.
    """

    def __init__(
        self, scales: Tensor, shape: tuple[int, ...], *, outputs: int, inputs: int | None, high: int, wide: int
    ) -> None:
        super().__init__(scales, shape, scales.dtype)
        self._outputs, self._high = outputs, high
        self._columns = np.arange(shape[-1]) * (0 if inputs is None else wide) // (inputs or 1)

    @property
    def num_bytes(self) -> int:
        """What the rows take that they come from."""
        return self.source.num_bytes

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first dim."""
        flat = len(self.shape) == 2
        rows = np.arange(*((start, stop) if flat else (0, self.shape[-2]))) * self._high // self._outputs
        first = int(rows[0]) if flat else 0
        found = self.source.read_rows(first, int(rows[-1]) + 1) if flat else self.source.read_rows(start, stop)
        return found[..., rows - first, :][..., self._columns]


class Dequantised(_Made):
    """The values [..., out, in] of numbers and their published scales, as float32; swapped: as [..., in, out]."""

    def __init__(self, numbers: Tensor, scales: Tensor, format: Format, *, swapped: bool = False) -> None:
        *lead, outputs, items = numbers.shape
        inputs = items * format.per_item
        shape = (*lead, inputs, outputs) if swapped else (*lead, outputs, inputs)
        super().__init__(numbers, shape, np.float32)
        self._scales, self._format, self._swapped = scales, format, swapped

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first dim."""
        numbers, block = self.source.read_rows(start, stop), self._format.outputs
        if numbers.ndim > 2:
            values = dequantise(numbers, self._scales.read_rows(start, stop), self._format)
            return values.swapaxes(-1, -2) if self._swapped else values
        scales = self._scales.read_rows(start // block, -(-stop // block))
        return dequantise(numbers, scales, self._format, first=start % block)


def dequantise(numbers: np.ndarray, scales: np.ndarray, format: Format, *, first: int = 0) -> np.ndarray:
    """float32 values [..., out, in] of numbers (packed where the format packs) and the scales of their blocks.

    first: the row of a block that the first row is.
    """
    values = (
        _BYTE_VALUES[numbers].reshape(*numbers.shape[:-1], -1) if format.per_item > 1 else numbers.astype(np.float32)
    )
    rows = (np.arange(values.shape[-2]) + first) // format.outputs
    factors = _as_float(scales)[..., rows, :]
    if format.inputs is not None:
        factors = np.repeat(factors, format.inputs, axis=-1)[..., : values.shape[-1]]
    return values * factors


def _as_float(scales: np.ndarray) -> np.ndarray:
    """Scales as float32; those of eight bits are exponents."""
    scales = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    return scales.astype(np.float32)


class Quantiser:
    """Plain matrices [..., out, in] as numbers and scales: the largest number of a block becomes the largest there is.

    A scale is float32, largest / LARGEST of the dtype; numbers are rounded to nearest, ties to even.
    """

    def __init__(self, source: Tensor, format: Format) -> None:
        assert format.per_item == 1
        *lead, outputs, inputs = source.shape
        self.source, self.format = source, format
        columns = 1 if format.inputs is None else -(-inputs // format.inputs)
        self._scales = np.zeros((*lead, -(-outputs // format.outputs), columns), np.float32)
        self._known = np.zeros(len(self._scales), bool)  # scales are kept once they are found: they are few

    @property
    def numbers(self) -> Tensor:
        """Of the shape of the source."""
        return _Numbers(self)

    @property
    def scales(self) -> Tensor:
        """Of all blocks."""
        return _Scales(self)

    def quantised(self, start: int, stop: int) -> np.ndarray:
        """Numbers of rows start..stop of the first dim."""
        block = self.format.outputs if self._scales.ndim == 2 else 1
        first, last = start // block, -(-stop // block)
        values = self.source.read_rows(first * block, min(last * block, self.source.shape[0])).astype(np.float32)
        self._find(values, first, last)
        factors = self._at_rows(values, first, last)
        shrunk = values / np.where(factors > 0, factors, 1)
        numbers = np.rint(shrunk) if self.format.dtype == "int8" else shrunk
        return numbers.astype(self.format.dtype)[start - first * block : stop - first * block]

    def scales_of(self, first: int, last: int) -> np.ndarray:
        """Scales first..last of the first dim."""
        if not self._known[first:last].all():
            block = self.format.outputs if self._scales.ndim == 2 else 1
            values = self.source.read_rows(first * block, min(last * block, self.source.shape[0])).astype(np.float32)
            self._find(values, first, last)
        return self._scales[first:last]

    def _find(self, values: np.ndarray, first: int, last: int) -> None:
        high, wide = self.format.outputs, self.format.inputs or values.shape[-1]
        largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.shape[-1], wide), axis=-1)
        largest = np.maximum.reduceat(largest, np.arange(0, values.shape[-2], high), axis=-2)
        self._scales[first:last] = largest / np.float32(LARGEST[self.format.dtype])
        self._known[first:last] = True

    def _at_rows(self, values: np.ndarray, first: int, last: int) -> np.ndarray:
        factors = np.repeat(self._scales[first:last], self.format.outputs, axis=-2)[..., : values.shape[-2], :]
        if self.format.inputs is not None:
            factors = np.repeat(factors, self.format.inputs, axis=-1)[..., : values.shape[-1]]
        return factors


class _Numbers(_Made):
    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__(quantiser.source, quantiser.source.shape, quantiser.format.dtype)
        self._quantiser = quantiser

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._quantiser.quantised(start, stop)


class _Scales(_Made):
    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__(quantiser.source, quantiser._scales.shape, np.float32)
        self._quantiser = quantiser

    @property
    def num_bytes(self) -> int:
        """What reading them takes: the rows they are found from."""
        return math.prod(self._quantiser.source.shape) * 4

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._quantiser.scales_of(start, stop)

"""Lazy tensors that convert the contents of files when rows are read.

They give the numbers and scales of a checkpoint format, dequantized values, or quantized matrices. All of them are read
by rows of the first dim, like tensors of files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.quantization.formats import QMAX, QuantizationFormat

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BYTE_VALUES = np.stack([np.concatenate([_E2M1, -_E2M1])[np.arange(256) >> shift & 15] for shift in (0, 4)], axis=-1)


class LazyTensor(Protocol):
    """Read rows of a tensor from a file, or compute them from tensors of a file.

    path, start: location of its first byte.
    """

    path: Path
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the rows that are read."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the memory in bytes that all rows take while they are read."""
        ...

    def at(self, index: int) -> LazyTensor:
        """Return one entry of the first dim as a tensor."""
        ...

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        ...


class _TensorView:
    """Provide the common part of tensors derived from a tensor of a file.

    Tensors of two dims are read by rows; others are read one entry at a time.
    """

    def __init__(self, source: LazyTensor, shape: tuple[int, ...], dtype: Any) -> None:
        self.source, self.shape, self.dtype = source, shape, np.dtype(dtype)
        self.path, self.start = source.path, source.start

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all source rows, or of their values in float32 if that is more."""
        return max(self.source.num_bytes, math.prod(self.shape) * 4)


class ReshapedTensor(_TensorView):
    """Reshape the dims after the first; the numbers and their order stay the same."""

    def __init__(self, source: LazyTensor, shape: tuple[int, ...]) -> None:
        super().__init__(source, shape, source.dtype)

    def at(self, index: int) -> ReshapedTensor:
        """Return one entry of the first dim."""
        return ReshapedTensor(self.source.at(index), self.shape[1:])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        return self.source.read_rows(start, stop).reshape(stop - start, *self.shape[1:])


class TransposedTensor(_TensorView):
    """Exchange the last two dims of a tensor; reading any row reads the whole source matrix."""

    def __init__(self, source: LazyTensor) -> None:
        *lead, rows, columns = source.shape
        super().__init__(source, (*lead, columns, rows), source.dtype)

    @property
    def num_bytes(self) -> int:
        """Return a small size so that the reader takes all rows in one call."""
        return self.shape[0]

    def at(self, index: int) -> TransposedTensor:
        """Return one entry of the first dim."""
        return TransposedTensor(self.source.at(index))

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        return self.source.read_rows(0, self.source.shape[0]).T[start:stop]


class BitcastTensor(_TensorView):
    """Reinterpret 8-bit numbers as uint8."""

    def __init__(self, source: LazyTensor) -> None:
        super().__init__(source, source.shape, np.uint8)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all source rows."""
        return self.source.num_bytes

    def at(self, index: int) -> BitcastTensor:
        """Return one entry of the first dim."""
        return BitcastTensor(self.source.at(index))

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        return self.source.read_rows(start, stop).view(np.uint8)


class ScaleView(_TensorView):
    """Read checkpoint scales [..., rows, columns] at the blocks of a parameter.

    Each block gets the scale of the checkpoint block that contains it. outputs, inputs: extents of a checkpoint block
    (inputs=None: all). high, wide: extents of a parameter block along outputs and inputs.
    """

    def __init__(
        self, scales: LazyTensor, shape: tuple[int, ...], *, outputs: int, inputs: int | None, high: int, wide: int
    ) -> None:
        super().__init__(scales, shape, scales.dtype)
        self._blocks = dict(outputs=outputs, inputs=inputs, high=high, wide=wide)
        self._outputs, self._high = outputs, high
        self._columns = np.arange(shape[-1]) * (0 if inputs is None else wide) // (inputs or 1)

    def at(self, index: int) -> ScaleView:
        """Return one entry of the first dim."""
        return ScaleView(self.source.at(index), self.shape[1:], **self._blocks)  # type: ignore[arg-type]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        rows = np.arange(start, stop) * self._high // self._outputs
        values = self.source.read_rows(int(rows[0]), int(rows[-1]) + 1)
        return values[rows - rows[0]][:, self._columns]


class DequantizedTensor(_TensorView):
    """Compute float32 values [..., out, in] from numbers and their checkpoint scales."""

    def __init__(self, numbers: LazyTensor, scales: LazyTensor, format: QuantizationFormat) -> None:
        *lead, outputs, items = numbers.shape
        super().__init__(numbers, (*lead, outputs, items * format.packing_factor), np.float32)
        self._scales, self._format = scales, format

    def at(self, index: int) -> DequantizedTensor:
        """Return one entry of the first dim."""
        return DequantizedTensor(self.source.at(index), self._scales.at(index), self._format)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of the first dim."""
        block = self._format.outputs
        scales = self._scales.read_rows(start // block, -(-stop // block))
        return dequantize(self.source.read_rows(start, stop), scales, self._format, first=start % block)


def dequantize(numbers: np.ndarray, scales: np.ndarray, format: QuantizationFormat, *, first: int = 0) -> np.ndarray:
    """Return float32 values [..., out, in] from numbers (packed if the format packs them) and block scales.

    first: index of the first row within its block.
    """
    values = (
        _BYTE_VALUES[numbers].reshape(*numbers.shape[:-1], -1)
        if format.packing_factor > 1
        else numbers.astype(np.float32)
    )
    rows = (np.arange(values.shape[-2]) + first) // format.outputs
    factors = _as_float(scales)[..., rows, :]
    if format.inputs is not None:
        factors = np.repeat(factors, format.inputs, axis=-1)[..., : values.shape[-1]]
    return values * factors


def _as_float(scales: np.ndarray) -> np.ndarray:
    """Return scales as float32; 8-bit scales are exponents."""
    scales = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    return scales.astype(np.float32)


def scales_of(values: np.ndarray, format: QuantizationFormat) -> np.ndarray:
    """Return the float32 scales of the blocks of float32 values [out, in].

    A scale is the largest magnitude of its block divided by QMAX of the dtype, or 0 if that is not a normal number.
    """
    wide = format.inputs or values.shape[1]
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.shape[1], wide), axis=1)
    largest = np.maximum.reduceat(largest, np.arange(0, len(values), format.outputs), axis=0)
    scales = largest / np.float32(QMAX[format.dtype])
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(0), scales)


def check_quantizable(name: str, scales: np.ndarray) -> None:
    """Raise CheckpointError if the scales of a tensor show that it contains a non-finite number."""
    if not np.isfinite(scales).all():
        raise CheckpointError(f"tensor {name!r} contains a number that is not finite, so it cannot be quantized")


def quantized(values: np.ndarray, scales: np.ndarray, format: QuantizationFormat) -> np.ndarray:
    """Return the numbers of float32 values [out, in], and overwrite the values.

    Values are divided by the scales of their blocks and rounded to nearest, ties to even.
    """
    divisors = np.where(scales > 0, scales, np.float32(1))
    if format.inputs is not None:
        divisors = np.repeat(divisors, format.inputs, axis=1)[:, : values.shape[1]]
    high = format.outputs
    if high == 1:
        values /= divisors
    else:
        for row, divisor in enumerate(divisors):
            values[row * high : (row + 1) * high] /= divisor
    if format.dtype == "int8":
        np.rint(values, out=values)
    return values.astype(format.dtype)


class TensorQuantizer:
    """Quantize matrices [..., out, in] into numbers and scales on read; see scales_of and quantized."""

    def __init__(self, source: LazyTensor, format: QuantizationFormat, name: str) -> None:
        """Create a quantizer. name: name of the tensor in errors."""
        assert format.packing_factor == 1
        *lead, outputs, inputs = source.shape
        self.source, self.format, self.name = source, format, name
        columns = 1 if format.inputs is None else -(-inputs // format.inputs)
        self.scale_shape = (*lead, -(-outputs // format.outputs), columns)
        self._entries: dict[int, TensorQuantizer] = {}
        self._scales = np.zeros(self.scale_shape[-2:], np.float32)  # cached, because they are few
        self._known = np.zeros(len(self._scales), bool)

    @property
    def numbers(self) -> LazyTensor:
        """Return the numbers, in the shape of the source."""
        return _QuantizedNumbers(self)

    @property
    def scales(self) -> LazyTensor:
        """Return the scales of all blocks."""
        return _QuantizedScales(self)

    def at(self, index: int) -> TensorQuantizer:
        """Return the quantizer of one entry of the first dim."""
        return self._entries.setdefault(index, TensorQuantizer(self.source.at(index), self.format, self.name))

    def numbers_of(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers of rows start..stop."""
        high = self.format.outputs
        first, last = start // high, -(-stop // high)
        numbers = quantized(self._find(first, last), self._scales[first:last], self.format)
        return numbers[start - first * high : stop - first * high]

    def scales_of(self, first: int, last: int) -> np.ndarray:
        """Return the scales of block rows first..last."""
        if not self._known[first:last].all():
            self._find(first, last)
        return self._scales[first:last]

    def _find(self, first: int, last: int) -> np.ndarray:
        """Return the values of block rows first..last and cache their scales. Raises: CheckpointError."""
        high = self.format.outputs
        values = self.source.read_rows(first * high, min(last * high, self.source.shape[0])).astype(np.float32)
        self._scales[first:last] = scales = scales_of(values, self.format)
        check_quantizable(self.name, scales)
        self._known[first:last] = True
        return values


class _QuantizedNumbers(_TensorView):
    def __init__(self, quantizer: TensorQuantizer) -> None:
        super().__init__(quantizer.source, quantizer.source.shape, quantizer.format.dtype)
        self._quantizer = quantizer

    def at(self, index: int) -> LazyTensor:
        return self._quantizer.at(index).numbers

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._quantizer.numbers_of(start, stop)


class _QuantizedScales(_TensorView):
    def __init__(self, quantizer: TensorQuantizer) -> None:
        super().__init__(quantizer.source, quantizer.scale_shape, np.float32)
        self._quantizer = quantizer

    def at(self, index: int) -> LazyTensor:
        return self._quantizer.at(index).scales

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._quantizer.scales_of(start, stop)

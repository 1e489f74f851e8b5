"""Tensor transforms of a conversion: the identity and casts. quantize_transform.py adds quantization.

A transform receives a tensor as a stream of slices and returns the next part of each of its outputs, so that no tensor
must fit in memory. For example, a block-quantized weight has two outputs, and its granule is one row of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.families import is_exact
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG
from jaxmoe.weights.dtypes import DTYPES, FLOAT_NAMES, TensorSpec, beyond_reach

WEIGHTS_DTYPES = {name: stored for stored, name in FLOAT_NAMES.items()}
_PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorTransform(Protocol):
    """Transform one checkpoint tensor into one or several, deterministically."""

    working_ratio: float
    """Peak bytes that apply allocates per byte of its slice."""

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the outputs for a tensor. If the only output equals the tensor, its bits are copied unchanged.

        Raises: CheckpointError for an unsupported tensor.
        """
        ...

    def granule(self, tensor: TensorSpec) -> int:
        """Return the alignment of slices, in numbers of the tensor."""
        ...

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """Return the next numbers of every output, as flat arrays, for the next numbers of the tensor."""
        ...

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json of the result for the parsed config.json of the source."""
        ...


class IdentityTransform:
    """Copy the bits of tensors of any dtype unchanged."""

    working_ratio = 0.0

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensor itself."""
        return (tensor,)

    def granule(self, tensor: TensorSpec) -> int:
        """Return 1: slices may begin anywhere."""
        return 1

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """Return the numbers unchanged."""
        return (numbers,)

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the config unchanged."""
        return raw


class CastFloats(IdentityTransform):
    """Cast floating-point tensors to another dtype; leave integers and tensors that models need exact unchanged."""

    working_ratio = 6.0  # float16 via float32, the result, and two masks

    def __init__(self, dtype: str) -> None:
        """dtype: one of WEIGHTS_DTYPES. Raises: CheckpointError for any other."""
        if dtype not in WEIGHTS_DTYPES:
            raise CheckpointError(f"weights_dtype={dtype!r} must be one of {', '.join(WEIGHTS_DTYPES)}")
        self._name, self._to = dtype, WEIGHTS_DTYPES[dtype]

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return one output of the same name and shape."""
        dtype = self._to if tensor.dtype in _PLAIN_FLOATS and not is_exact(tensor.name) else tensor.dtype
        return (TensorSpec(name=tensor.name, dtype=dtype, shape=tensor.shape),)

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """Round to nearest, ties to even. Raises: CheckpointError if a finite number becomes infinite."""
        if self.outputs(tensor) == (tensor,):
            return (numbers,)
        to = DTYPES[self._to].numpy
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            near = _odd_float32(numbers) if (tensor.dtype, self._to) == ("F64", "BF16") else numbers
            cast = near.astype(to)
        if float(ml_dtypes.finfo(to).max) < float(ml_dtypes.finfo(numbers.dtype).max):
            infinite = _is_infinite(cast)
            if infinite.any() and (lost := infinite & np.isfinite(numbers)).any():
                remedy = "choose a dtype of larger range, or omit weights_dtype to keep every bit"
                raise beyond_reach(tensor.name, float(numbers[lost][0]), self._name, remedy)
        return (cast,)

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with every dtype replaced (or one added at the top level) and no quantization_config."""
        raw = {key: value for key, value in raw.items() if key != QUANTIZATION_CONFIG}
        changed = _named(raw, self._name)
        return changed if changed != raw or _names_dtype(raw) else {**raw, "torch_dtype": self._name}


def _is_infinite(numbers: np.ndarray) -> np.ndarray:
    """Return a mask of infinite numbers.

    It compares bits without the sign, which is several times faster than np.isinf for 16-bit numbers.
    """
    whole = np.dtype(f"u{numbers.itemsize}")
    return numbers.view(whole) << 1 == np.array([np.inf], numbers.dtype).view(whole) << 1


def _odd_float32(numbers: np.ndarray) -> np.ndarray:
    """Convert float64 to float32 by truncation, and set the last bit of inexact results (round to odd).

    Rounding the result again, to fewer bits, then gives the nearest number. Rounding to nearest twice may not.
    """
    near = numbers.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(numbers)
    bits |= near != numbers
    return near


def _named(raw: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    named = dict(raw)
    for key, value in raw.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            named[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config") and key != QUANTIZATION_CONFIG:
            named[key] = _named(value, dtype)
    return named


def _names_dtype(raw: Mapping[str, Any]) -> bool:
    return any(isinstance(raw.get(key), str) for key in ("dtype", "torch_dtype"))

"""What conversion does to tensors on their way: nothing, or another dtype. The place where quantization joins.

A transform sees a tensor as a stream of slices and gives the next part of each tensor that is made of it, so that none
need be whole in memory: a block-quantized weight, say, is two outputs, and its granule is one row of blocks.
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
    """From one checkpoint tensor to one or several. The same tensor always gives the same bytes."""

    working_ratio: float
    """Most bytes that apply holds at once, for each byte of its slice."""

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """What is made of a tensor: where that is the tensor alone, bits go through. Raises: CheckpointError for one
        that it cannot take."""
        ...

    def granule(self, tensor: TensorSpec) -> int:
        """Slices begin at multiples of so many numbers."""
        ...

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """The next numbers of every output, flat, from the tensor's next."""
        ...

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """config.json of the result."""
        ...


class IdentityTransform:
    """Bits go through, whatever they mean."""

    working_ratio = 0.0

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """The tensor itself."""
        return (tensor,)

    def granule(self, tensor: TensorSpec) -> int:
        """Any slice will do."""
        return 1

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """The same."""
        return (numbers,)

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The same."""
        return raw


class CastFloats(IdentityTransform):
    """Plain floating point becomes another; integers stay, and what models hold exactly, whatever their dtype."""

    working_ratio = 6.0  # float16 by way of float32, the result, and two masks

    def __init__(self, dtype: str) -> None:
        """dtype: one of WEIGHTS_DTYPES. Raises: CheckpointError for another."""
        if dtype not in WEIGHTS_DTYPES:
            raise CheckpointError(f"weights_dtype={dtype!r} must be one of {', '.join(WEIGHTS_DTYPES)}")
        self._name, self._to = dtype, WEIGHTS_DTYPES[dtype]

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """One, of the same name and shape."""
        dtype = self._to if tensor.dtype in _PLAIN_FLOATS and not is_exact(tensor.name) else tensor.dtype
        return (TensorSpec(name=tensor.name, dtype=dtype, shape=tensor.shape),)

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """Rounded to nearest, ties to even. Raises: CheckpointError where a finite number becomes infinite."""
        if self.outputs(tensor) == (tensor,):
            return (numbers,)
        to = DTYPES[self._to].numpy
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            near = _odd_float32(numbers) if (tensor.dtype, self._to) == ("F64", "BF16") else numbers
            cast = near.astype(to)
        if float(ml_dtypes.finfo(to).max) < float(ml_dtypes.finfo(numbers.dtype).max):
            infinite = _is_infinite(cast)
            if infinite.any() and (lost := infinite & np.isfinite(numbers)).any():
                remedy = "choose one that does, or leave it out to keep every bit"
                raise beyond_reach(tensor.name, float(numbers[lost][0]), self._name, remedy)
        return (cast,)

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """With the dtype wherever it is named, and at the top where it is nowhere; nothing is quantized any more."""
        raw = {key: value for key, value in raw.items() if key != QUANTIZATION_CONFIG}
        changed = _named(raw, self._name)
        return changed if changed != raw or _names_dtype(raw) else {**raw, "torch_dtype": self._name}


def _is_infinite(numbers: np.ndarray) -> np.ndarray:
    """Which are, by their bits but the sign's: several times as fast as np.isinf for 16 of them."""
    whole = np.dtype(f"u{numbers.itemsize}")
    return numbers.view(whole) << 1 == np.array([np.inf], numbers.dtype).view(whole) << 1


def _odd_float32(numbers: np.ndarray) -> np.ndarray:
    """float32 of float64: cut off, and the last bit set where that loses something. Numbers rounded again, to fewer
    bits, are then the nearest of those; rounded twice they need not be."""
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

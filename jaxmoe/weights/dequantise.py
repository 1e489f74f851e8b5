"""A quantised checkpoint's tensors as plain ones, by their published names alone: any family, layers that no model here
runs among them. Rows are dequantised as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.formats import Published
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.formats import Dequantised, Reshaped, Swapped, Tensor
from jaxmoe.weights.safetensors_file import TensorInfo


class Made:
    """A tensor that is made of others, read as if a file held it. source_bytes: of those it is made of."""

    def __init__(self, name: str, tensor: Tensor, source: TensorInfo, scales: TensorInfo) -> None:
        self.spec = TensorSpec(name=name, dtype="F32", shape=tensor.shape)
        self.path, self.start = source.path, source.start
        self.num_bytes, self.source_bytes = self.spec.num_bytes, source.num_bytes + scales.num_bytes
        self._tensor = tensor

    @property
    def row_numbers(self) -> int:
        """Numbers of one entry of the first dim."""
        return math.prod(self.spec.shape[1:])

    def read_bytes(self, start: int, out: memoryview) -> None:
        """Fill out with whole rows, from byte `start` on."""
        row_bytes = 4 * self.row_numbers
        first, count = start // row_bytes, len(out) // row_bytes
        numbers = np.frombuffer(out, np.float32).reshape(count, *self.spec.shape[1:])
        if len(self.spec.shape) == 2:
            numbers[...] = self._tensor.read_rows(first, first + count)
            return
        for index in range(count):
            numbers[index] = self._tensor.at(first + index).read_rows(0, self.spec.shape[1])


def plain_tensors(tensors: Mapping[str, TensorInfo], published: Published) -> Iterator[TensorInfo | Made]:
    """Every tensor of a checkpoint that is quantised as published, in place of numbers and scales their values.

    Raises: CheckpointError for numbers without scales, or scales of another shape.
    """
    form = published.format
    ends = {"fp8": ("", "_scale_inv"), "compressed-tensors": ("", "_scale"), "mxfp4": ("_blocks", "_scales")}
    of_numbers, of_scales = ends[published.method]
    number_dtype = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "mxfp4": "U8"}[form.dtype]
    for name, tensor in tensors.items():
        stem = name.removesuffix(of_numbers) if of_numbers else name
        quantised = tensor.dtype_name == number_dtype and name.endswith(of_numbers) and name != f"{stem}{of_scales}"
        if not quantised:
            if not (name.endswith(of_scales) and name.removesuffix(of_scales) + of_numbers in tensors):
                yield tensor
            continue
        scales = tensors.get(stem + of_scales)
        if scales is None:
            raise CheckpointError(f"tensor {name!r} of dtype {number_dtype} has no scales, {stem + of_scales}")
        items = tensor.shape if form.per_item == 1 else (*tensor.shape[:-2], tensor.shape[-2] * tensor.shape[-1])
        *lead, outputs, inputs = (*items[:-1], items[-1] * form.per_item)
        blocks = (-(-outputs // form.outputs), 1 if form.inputs is None else -(-inputs // form.inputs))
        if math.prod(scales.shape) != math.prod((*lead, *blocks)):
            raise CheckpointError(
                f"tensor {stem + of_scales!r} has shape {list(scales.shape)}, that of {name!r} needs "
                f"{[*lead, *blocks]}: fetch it again"
            )
        values: Tensor = Dequantised(_shaped(tensor, items), _shaped(scales, (*lead, *blocks)), form)
        values = Swapped(values) if lead else values  # plain ones of all experts are published the other way round
        yield Made(stem, values, tensor, scales)


def _shaped(tensor: TensorInfo, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else Reshaped(tensor, shape)

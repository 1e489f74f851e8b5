"""A quantised checkpoint's tensors as plain ones, by their published names alone: any family, layers that no model here
runs among them. Rows are dequantised as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.formats import Format, Published
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.formats import Dequantised, Reshaped, Swapped, Tensor
from jaxmoe.weights.safetensors_file import FLOATS, TensorInfo


class Made:
    """A tensor that is made of others, sources, read as if a file held it. source_bytes: of those."""

    def __init__(self, name: str, tensor: Tensor, source: TensorInfo, scales: TensorInfo) -> None:
        self.spec = TensorSpec(name=name, dtype="F32", shape=tensor.shape)
        self.path, self.start, self.sources = source.path, source.start, (source, scales)
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

    Raises: CheckpointError for numbers without scales, or either of a shape or dtype that cannot be.
    """
    form = published.format
    packed = form.per_item > 1
    ends = {"fp8": ("", "_scale_inv"), "compressed-tensors": ("", "_scale"), "mxfp4": ("_blocks", "_scales")}
    of_numbers, of_scales = ends[published.method]
    number_dtype = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "mxfp4": "U8"}[form.dtype]
    stems = {
        name: name.removesuffix(of_numbers)
        for name, tensor in tensors.items()
        if tensor.dtype_name == number_dtype and name.endswith(of_numbers)
    }
    all_scales = {stem + of_scales for stem in stems.values()}
    for name, tensor in tensors.items():
        if name not in stems:
            if name not in all_scales:
                yield tensor
            continue
        stem = stems[name]
        scales = tensors.get(stem + of_scales)
        if scales is None:
            raise CheckpointError(f"tensor {name!r} of dtype {number_dtype} has no scales, {stem + of_scales}")
        *lead, outputs, inputs = _shape_of_values(tensor, form)
        items = (*lead, outputs, inputs // form.per_item)
        blocks = (-(-outputs // form.outputs), 1 if form.inputs is None else -(-inputs // form.inputs))
        flat = [(*lead, blocks[0])] if published.method == "compressed-tensors" else []
        if scales.shape not in ((*lead, *blocks), *flat):
            raise CheckpointError(
                f"tensor {stem + of_scales!r} has shape {list(scales.shape)}, that of {name!r} needs "
                f"{[*lead, *blocks]}: fetch it again"
            )
        scales.check_dtype(("U8",) if packed else (*FLOATS, "F8_E8M0"), why=f" (scales of {name!r})")
        values: Tensor = Dequantised(_shaped(tensor, items), _shaped(scales, (*lead, *blocks)), form)
        values = Swapped(values) if lead else values  # plain ones of all experts are published the other way round
        yield Made(stem, values, tensor, scales)


def _shape_of_values(tensor: TensorInfo, form: Format) -> tuple[int, ...]:
    """[out, in] or, of all experts, [expert, out, in]; packed numbers have a dim for a block's bytes beside that."""
    shape = tensor.shape
    if form.per_item > 1:
        block = (form.inputs or 1) // form.per_item
        shape = (*shape[:-2], shape[-2] * block * form.per_item) if len(shape) > 2 and shape[-1] == block else ()
    if len(shape) not in (2, 3):
        raise CheckpointError(
            f"tensor {tensor.name!r} has shape {list(tensor.shape)}, which is none of a quantised matrix, or of all "
            f"experts': fetch it again"
        )
    return shape


def _shaped(tensor: TensorInfo, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else Reshaped(tensor, shape)

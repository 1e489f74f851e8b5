"""Dequantization of a checkpoint's tensors by their names alone.

It works for any model family, including layers that no model here runs. Rows are dequantized as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.quantization.formats import CheckpointQuantization, QuantizationFormat
from jaxmoe.quantization.tensors import DequantizedTensor, LazyTensor, TransposedTensor
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.quantized_sources import NUMBER_NAMES, expected_scales, quantized_tensor_names, shaped
from jaxmoe.weights.safetensors_file import TensorInfo

_SCALES = ("_scale", "_scale_inv", "_scales")  # suffixes of scale names, for all formats


class DerivedTensor:
    """Present the dequantized values of two stored tensors (numbers and scales) as one float32 tensor of a file.

    source_bytes: bytes of the two stored tensors.
    """

    def __init__(self, name: str, tensor: LazyTensor, source: TensorInfo, scales: TensorInfo) -> None:
        self.spec = TensorSpec(name=name, dtype="F32", shape=tensor.shape)
        self.path, self.start, self.sources = source.path, source.start, (source, scales)
        self.num_bytes, self.source_bytes = self.spec.num_bytes, source.num_bytes + scales.num_bytes
        self._tensor = tensor

    @property
    def row_numbers(self) -> int:
        """Return the number of elements in one entry of the first dim."""
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


def plain_tensors(
    tensors: Mapping[str, TensorInfo], quant_config: CheckpointQuantization, *, turn_experts: bool = True
) -> Iterator[TensorInfo | DerivedTensor]:
    """Yield every tensor of a quantized checkpoint, with dequantized values in place of numbers and scales.

    turn_experts: whether a plain tensor with the matrices of all experts is stored as [expert, in, out].
    Raises: CheckpointError for numbers without scales, scales without numbers, and invalid shapes or dtypes.
    """
    form, number_dtype = quant_config.format, NUMBER_NAMES[quant_config.format.dtype]
    of_numbers, of_scales = quantized_tensor_names("", quant_config)  # suffixes of their names
    stems = {
        name: name.removesuffix(of_numbers)
        for name, tensor in tensors.items()
        if tensor.dtype_name == number_dtype and name.endswith(of_numbers)
    }
    all_scales = {stem + of_scales for stem in stems.values()}
    for name, tensor in tensors.items():
        if name not in stems:
            if name not in all_scales:
                _check_plain(tensor, tensors, quant_config)
                yield tensor
            continue
        stem = stems[name]
        scales = tensors.get(stem + of_scales)
        if scales is None:
            raise CheckpointError(f"tensor {name!r} of dtype {number_dtype} has no scales, {stem + of_scales}")
        shape = _shape_of_values(tensor, form)
        expected = expected_scales(shape, quant_config, why=f" (scales of {name!r})")
        if scales.shape not in expected.shapes:
            raise CheckpointError(
                f"tensor {stem + of_scales!r} has shape {list(scales.shape)}, but {name!r} needs "
                f"{list(expected.shapes[0])}: fetch it again"
            )
        scales.check_dtype(expected.dtypes, why=expected.why)
        items = (*shape[:-1], shape[-1] // form.packing_factor)
        values: LazyTensor = DequantizedTensor(shaped(tensor, items), shaped(scales, expected.shapes[0]), form)
        turned = turn_experts and len(shape) == 3
        yield DerivedTensor(stem, TransposedTensor(values) if turned else values, tensor, scales)


def _check_plain(tensor: TensorInfo, tensors: Mapping[str, TensorInfo], quant_config: CheckpointQuantization) -> None:
    """Raise CheckpointError for a tensor that looks like scales or quantized numbers but has no counterpart."""
    of_numbers, of_scales = quantized_tensor_names("", quant_config)
    number_dtype, stem = NUMBER_NAMES[quant_config.format.dtype], tensor.name.removesuffix(of_scales)
    # A name that ends in "_scale" may be a plain parameter.
    sure = stem + of_numbers in tensors or stem.endswith(".weight") or of_scales != "_scale"
    scales = tensor.name.endswith(of_scales) and sure
    stem = tensor.name.removesuffix("_blocks")
    few_bits = tensor.dtype_name in ("I8", "U8") or tensor.dtype_name.startswith("F8_")
    if scales or (few_bits and any(stem + end in tensors for end in _SCALES)):
        raise CheckpointError(
            f"tensor {tensor.name!r} of dtype {tensor.dtype_name} belongs to no matrix of quant_method "
            f"{quant_config.method}, which has numbers NAME{of_numbers} of dtype {number_dtype} and scales "
            f"NAME{of_scales}: fetch the checkpoint again"
        )


def _shape_of_values(tensor: TensorInfo, form: QuantizationFormat) -> tuple[int, ...]:
    """Return the shape of the values: [out, in], or [expert, out, in] for stacked experts.

    Packed numbers have one more dim, the bytes of a block. Raises: CheckpointError for any other shape.
    """
    shape = tensor.shape
    if form.packing_factor > 1:
        block = (form.inputs or 1) // form.packing_factor
        shape = (*shape[:-2], shape[-2] * block * form.packing_factor) if len(shape) > 2 and shape[-1] == block else ()
    if len(shape) not in (2, 3):
        raise CheckpointError(
            f"tensor {tensor.name!r} has shape {list(tensor.shape)}, which is not that of a quantized matrix or of "
            f"stacked experts: fetch it again"
        )
    return shape

"""Lazy tensors for loading, if the checkpoint or the parameters are quantized: dequantize, quantize or reshape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxmoe.config import ModelConfig
from jaxmoe.quantization.formats import CheckpointQuantization, QuantizationFormat
from jaxmoe.quantization.layout import (
    block_shape,
    is_matrix,
    matrix_block_shape,
    number_slice,
    oriented,
    scale_slices,
)
from jaxmoe.quantization.tensors import (
    BitcastTensor,
    DequantizedTensor,
    LazyTensor,
    ReshapedTensor,
    ScaleView,
    TensorQuantizer,
    TransposedTensor,
)
from jaxmoe.weight_slice import WeightSlice
from jaxmoe.weights.params import ParamInfo
from jaxmoe.weights.safetensors_file import FLOATS, TensorInfo

NUMBERS, SCALES = "numbers", "scales"  # last path components of a quantized parameter's two arrays
NUMBER_NAMES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "mxfp4": "U8"}


@dataclass(frozen=True, kw_only=True)
class ExpectedTensor:
    """Describe a tensor that the files must have. shapes, dtypes (safetensors names): any one of them is accepted."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = FLOATS
    why: str = ""


def quantized_tensor_names(key: str, quant_config: CheckpointQuantization) -> tuple[str, str]:
    """Return the names of the tensors with the numbers and the scales of a matrix."""
    if quant_config.method == "mxfp4":
        stem = key.removesuffix(".weight")
        return f"{stem}_blocks", f"{stem}_scales"
    return key, f"{key}_scale_inv" if quant_config.method == "fp8" else f"{key}_scale"


def checkpoint_scale_shape(shape: Sequence[int], format: QuantizationFormat) -> tuple[int, ...]:
    """Return the scale shape of a matrix [..., out, in]: its number of scale blocks along each dim."""
    *lead, outputs, inputs = shape
    return (*lead, -(-outputs // format.outputs), 1 if format.inputs is None else -(-inputs // format.inputs))


def expected_scales(shape: Sequence[int], quant_config: CheckpointQuantization, why: str) -> ExpectedTensor:
    """Return the expected scales of a matrix [..., out, in].

    The method compressed-tensors may omit the last dim of the scales, which has size 1.
    """
    scales = checkpoint_scale_shape(shape, quant_config.format)
    flat = (scales[:-1],) if quant_config.method == "compressed-tensors" else ()
    dtypes = ("U8",) if quant_config.format.packing_factor > 1 else (*FLOATS, "F8_E8M0")
    return ExpectedTensor(shapes=(scales, *flat), dtypes=dtypes, why=why)


def _is_quantized(
    weight_slice: WeightSlice,
    tensors: Mapping[str, TensorInfo],
    quant_config: CheckpointQuantization | None,
    *,
    kept: bool,
) -> bool:
    """Return whether the tensor of a weight slice is, or must be, stored as numbers and scales."""
    if quant_config is None or not is_matrix(weight_slice):
        return False
    return kept or any(
        name in tensors for name in quantized_tensor_names(weight_slice.key, quant_config) if name != weight_slice.key
    )


def expected_tensors(
    slices: Iterable[tuple[WeightSlice, bool]], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> dict[str, ExpectedTensor]:
    """Return the tensors that the files must have for weight slices, by name.

    slices: each weight slice with a flag that says whether its parameter stays quantized.
    """
    expected: dict[str, ExpectedTensor] = {}
    quant_config = config.checkpoint_quantization
    for weight_slice, kept in slices:
        if weight_slice.key in expected:
            continue
        if not _is_quantized(weight_slice, tensors, quant_config, kept=kept):
            expected[weight_slice.key] = ExpectedTensor(
                shapes=(weight_slice.key_shape,), why=_why_plain(weight_slice, tensors, quant_config)
            )
            continue
        assert quant_config is not None
        shape, format = oriented(weight_slice).key_shape, quant_config.format
        numbers = (*shape[:-1], shape[-1] // 32, 16) if format.packing_factor > 1 else shape
        names = quantized_tensor_names(weight_slice.key, quant_config)
        why = f" (quant_method {quant_config.method})"
        expected[names[0]] = ExpectedTensor(shapes=(numbers,), dtypes=(NUMBER_NAMES[format.dtype],), why=why)
        expected[names[1]] = expected_scales(shape, quant_config, why)
    return expected


def _why_plain(
    weight_slice: WeightSlice, tensors: Mapping[str, TensorInfo], quant_config: CheckpointQuantization | None
) -> str:
    """Return the hint of an error message about a tensor with 8-bit numbers where a plain one is expected."""
    if weight_slice.key not in tensors or tensors[weight_slice.key].dtype_name not in NUMBER_NAMES.values():
        return ""
    if quant_config is None:
        return ": config.json has no quantization_config that describes these numbers"
    return f": the checkpoint lacks its scales, {quantized_tensor_names(weight_slice.key, quant_config)[1]}"


def quantized_sources(
    tensors: Mapping[str, TensorInfo],
    table: Sequence[ParamInfo],
    parts: Mapping[str, list[WeightSlice]],
    config: ModelConfig,
) -> tuple[dict[str, LazyTensor], dict[str, list[WeightSlice]]]:
    """Return the lazy tensors and the weight slices of every parameter of the table.

    parts: weight slices of all parameters as if they were plain. Matrices that are quantized only in the files are
    dequantized; matrices that are quantized only in the model are quantized.
    """
    shapes = {info.path: info.shape for info in table}
    sources: dict[str, LazyTensor] = dict(tensors)
    by_path: dict[str, list[WeightSlice]] = {}
    for path, weight_slices in parts.items():
        to = f"{path}/{NUMBERS}", f"{path}/{SCALES}"
        if to[0] not in shapes:
            by_path[path] = weight_slices
            for weight_slice in weight_slices:
                if _is_quantized(weight_slice, tensors, config.checkpoint_quantization, kept=False):
                    sources[weight_slice.key] = _dequantized(weight_slice, tensors, config.checkpoint_quantization)
            continue
        assert config.quantization is not None
        format = config.quantization.format
        blocks = block_shape(shapes[to[0]], shapes[to[1]])
        numbers = [number_slice(weight_slice, format) for weight_slice in weight_slices]
        block = matrix_block_shape(numbers[0], blocks)
        by_path[to[0]] = [
            replace(weight_slice, path=to[0], key=_derived_name(weight_slice.key, NUMBERS)) for weight_slice in numbers
        ]
        by_path[to[1]] = []
        for weight_slice, plain in zip(numbers, weight_slices, strict=True):
            if _derived_name(weight_slice.key, NUMBERS) not in sources:
                sources |= _quantized(weight_slice, tensors, config, format, turned=oriented(plain) is not plain)
        for weight_slice in scale_slices(numbers, blocks):
            key = _derived_name(weight_slice.key, block)
            if key not in sources:
                sources[key] = ScaleView(
                    sources[_derived_name(weight_slice.key, SCALES)], weight_slice.key_shape,
                    outputs=format.outputs, high=block[0],
                    inputs=None if format.inputs is None else format.inputs // format.packing_factor, wide=block[1],
                )  # fmt: skip
            by_path[to[1]].append(replace(weight_slice, path=to[1], key=key))
    return sources, by_path


def _derived_name(key: str, what: object) -> str:
    """Return the name of a tensor derived from a matrix; no tensor of a file has such a name."""
    return f"{key} {what}"


def _open_quantized(
    key: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], quant_config: CheckpointQuantization
) -> tuple[LazyTensor, LazyTensor]:
    """Return the stored numbers (packed if the format packs) and the scales of a matrix [..., out, in]."""
    numbers, scales = (tensors[name] for name in quantized_tensor_names(key, quant_config))
    items = (*shape[:-1], shape[-1] // quant_config.format.packing_factor)
    return shaped(numbers, items), shaped(scales, checkpoint_scale_shape(shape, quant_config.format))


def shaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return a tensor with the same numbers in another shape."""
    return tensor if tensor.shape == shape else ReshapedTensor(tensor, shape)


def _dequantized(
    weight_slice: WeightSlice, tensors: Mapping[str, TensorInfo], quant_config: CheckpointQuantization | None
) -> LazyTensor:
    """Return the dequantized values of a matrix, with the dim order of plain checkpoints."""
    assert quant_config is not None
    arrays = _open_quantized(weight_slice.key, oriented(weight_slice).key_shape, tensors, quant_config)
    values = DequantizedTensor(*arrays, quant_config.format)
    return values if oriented(weight_slice) is weight_slice else TransposedTensor(values)


def _quantized(
    weight_slice: WeightSlice,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    format: QuantizationFormat,
    *,
    turned: bool,
) -> dict[str, LazyTensor]:
    """Return the numbers and scales of a matrix: read from the files, or quantized from a plain tensor.

    weight_slice: a slice of the matrix's numbers. turned: whether the plain tensor is stored [..., in, out].
    """
    if config.checkpoint_quantization is not None:
        shape = (*weight_slice.key_shape[:-1], weight_slice.key_shape[-1] * format.packing_factor)
        numbers, scales = _open_quantized(weight_slice.key, shape, tensors, config.checkpoint_quantization)
    else:
        plain: LazyTensor = tensors[weight_slice.key]
        quantizer = TensorQuantizer(TransposedTensor(plain) if turned else plain, format, weight_slice.key)
        numbers, scales = quantizer.numbers, quantizer.scales
    numbers = BitcastTensor(numbers) if format.dtype == "float8_e4m3fn" else numbers
    return {_derived_name(weight_slice.key, NUMBERS): numbers, _derived_name(weight_slice.key, SCALES): scales}

"""Quantization during conversion: matrices become numbers and scales in a checkpoint format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.config import canonical_dtype
from jaxmoe.errors import CheckpointError
from jaxmoe.families import FAMILIES, quantized_keys, read_config, with_layout
from jaxmoe.families.parameters import HEAD
from jaxmoe.families.quantization_writer import METHODS, quantization_config, written_as
from jaxmoe.quantization.formats import FORMATS, QUANTIZATION_CONFIG
from jaxmoe.quantization.tensors import check_quantizable, quantized, scales_of
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.quantized_sources import NUMBER_NAMES, checkpoint_scale_shape, quantized_tensor_names
from jaxmoe.weights.source_checkpoint import SourceCheckpoint
from jaxmoe.weights.stored import stored_layout
from jaxmoe.weights.transform import WEIGHTS_DTYPES, CastFloats, IdentityTransform, TensorTransform

_WEIGHT = ".weight"


class QuantizeTransform(IdentityTransform):
    """Quantize matrices into numbers and scales; leave other tensors unchanged."""

    working_ratio = 6.0  # for 2-byte inputs: float32 values, their magnitudes, numbers, and the cast's buffer

    def __init__(self, tensors: Mapping[str, TensorSpec], keys: set[str], weights_dtype: str, head: str) -> None:
        """tensors: all tensors of the checkpoint. keys: names of the tensors to quantize. head: module name of the LM
        head, which exists even if the checkpoint has no tensor for it."""
        matrices = {name for name, spec in tensors.items() if name.endswith(_WEIGHT) and len(spec.shape) > 1}
        plain = {name.removesuffix(_WEIGHT) for name in matrices - keys} | {head}
        self._keys = keys
        self._quant_config = written_as(weights_dtype, plain)

    def outputs(self, tensor: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensor itself, or its numbers and scales."""
        if tensor.name not in self._keys:
            return (tensor,)
        format = self._quant_config.format
        numbers, scales = quantized_tensor_names(tensor.name, self._quant_config)
        return (
            TensorSpec(name=numbers, dtype=NUMBER_NAMES[format.dtype], shape=tensor.shape),
            TensorSpec(name=scales, dtype="F32", shape=checkpoint_scale_shape(tensor.shape, format)),
        )

    def granule(self, tensor: TensorSpec) -> int:
        """Return the numbers in a row of blocks; 1 for tensors that are not quantized."""
        return self._quant_config.format.outputs * tensor.shape[1] if tensor.name in self._keys else 1

    def apply(self, tensor: TensorSpec, numbers: np.ndarray) -> Sequence[np.ndarray]:
        """Quantize as on load. Raises: CheckpointError for a number that is not finite."""
        if tensor.name not in self._keys:
            return (numbers,)
        values = numbers.reshape(-1, tensor.shape[1]).astype(np.float32)
        scales = scales_of(values, self._quant_config.format)
        check_quantizable(tensor.name, scales)
        return quantized(values, scales, self._quant_config.format).reshape(-1), scales.reshape(-1)

    def config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with a quantization_config that has the format and the unquantized modules."""
        return {**raw, QUANTIZATION_CONFIG: quantization_config(self._quant_config)}


def transform_of(
    weights_dtype: str | None, source_checkpoint: SourceCheckpoint, *, ignore_config_keys: Iterable[str] = ()
) -> TensorTransform:  # fmt: skip
    """Return the transform for a --weights-dtype.

    None copies tensors unchanged, "float32" and other floating-point dtypes cast, "int8" and other formats quantize.
    Raises: CheckpointError for an unknown dtype; ConfigError if the checkpoint does not support this quantization.
    """
    if weights_dtype is None:
        return IdentityTransform()
    weights_dtype = canonical_dtype(weights_dtype)
    if weights_dtype in WEIGHTS_DTYPES:
        return CastFloats(weights_dtype)
    if weights_dtype not in FORMATS:
        known = ", ".join((*WEIGHTS_DTYPES, *METHODS))
        raise CheckpointError(f"weights_dtype={weights_dtype!r} must be one of {known}")
    config = read_config(source_checkpoint.config, ignore=ignore_config_keys)
    config = with_layout(config, stored_layout(config, source_checkpoint.tensors))
    keys = quantized_keys(config, weights_dtype)
    return QuantizeTransform(
        source_checkpoint.specs, keys, weights_dtype, FAMILIES[config.family].names.prefix + HEAD.removesuffix(_WEIGHT)
    )

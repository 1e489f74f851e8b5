"""Formats of quantized matrices: numbers of few bits, with a scale for each block. This file handles no arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NumberDtype = Literal["int8", "float8_e4m3fn", "mxfp4"]
QuantMethod = Literal["fp8", "compressed-tensors", "mxfp4", "modelopt"]

QUANTIZATION_CONFIG = "quantization_config"  # key of config.json that describes the weights' format
# The number to which the largest value of a block or row is scaled.
QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True, kw_only=True)
class QuantizationFormat:
    """Describe the numbers of a matrix [out, in] and the scales of its blocks; a value is number * scale.

    dtype: mxfp4 has 4-bit numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) and 8-bit scales s
    that mean 2**(s - 127). It packs two numbers into a byte along the inputs, the low half first. The other dtypes have
    float32 scales.
    inputs, outputs: extents of a block, which starts at a multiple of them; inputs=None means all inputs of an output.
    Source: OCP Microscaling Formats 1.0 for mxfp4; DeepSeek-V3 (arXiv 2412.19437) for blocks.
    """

    dtype: NumberDtype
    inputs: int | None
    outputs: int

    @property
    def stored_dtype(self) -> str:
        """Return the dtype of arrays that hold the numbers or their bits; ops/quantized_matmul gives the reason."""
        return "int8" if self.dtype == "int8" else "uint8"

    @property
    def scale_dtype(self) -> str:
        """Return the dtype of arrays that hold the scales."""
        return "uint8" if self.dtype == "mxfp4" else "float32"

    @property
    def packing_factor(self) -> int:
        """Return how many numbers one item of stored_dtype packs along the inputs."""
        return 2 if self.dtype == "mxfp4" else 1

    @property
    def name(self) -> str:
        """Return the common name, regardless of the blocks: fp8, int8, mxfp4 or nvfp4."""
        return "nvfp4" if self == NVFP4 else {"float8_e4m3fn": "fp8"}.get(self.dtype, self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that --weights-dtype accepts for this format."""
        return (self.name, f"{self.name}-block") if self.inputs and self.packing_factor == 1 else (self.name,)


MXFP4 = QuantizationFormat(dtype="mxfp4", inputs=32, outputs=1)
# As large as NVIDIA's FP4 with an 8-bit scale for 16 numbers. It is only used for planning.
NVFP4 = QuantizationFormat(dtype="mxfp4", inputs=16, outputs=1)
# Formats into which loading can quantize a matrix, by the names that users give.
FORMATS: Mapping[str, QuantizationFormat] = MappingProxyType({
    "int8": QuantizationFormat(dtype="int8", inputs=None, outputs=1),
    "fp8": QuantizationFormat(dtype="float8_e4m3fn", inputs=None, outputs=1),
    "int8-block": QuantizationFormat(dtype="int8", inputs=128, outputs=128),
    "fp8-block": QuantizationFormat(dtype="float8_e4m3fn", inputs=128, outputs=128),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointQuantization:
    """Describe how a checkpoint stores its quantized matrices. ignored: names and patterns of unquantized modules."""

    method: QuantMethod
    format: QuantizationFormat
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockAlignment:
    """Hold the extents that the blocks of one parameter must divide, along inputs and outputs.

    Then no block of the parameter spans two blocks of the checkpoint. 0 means that the checkpoint has only one block.
    """

    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class WeightQuantization:
    """Hold the quantized parameters of a model and their format.

    layers: for each layer, its quantized parameters in order, by their paths within the block (as "attention/qkv").
    """

    format: QuantizationFormat
    layers: tuple[tuple[tuple[str, BlockAlignment], ...], ...]

    def of(self, layer: int) -> Mapping[str, BlockAlignment]:
        """Return the quantized parameters of a layer with their block alignments."""
        return dict(self.layers[layer])

    def holds(self, *names: str) -> bool:
        """Return whether any layer quantizes a parameter with a path that starts with one of the names."""
        return any(path.startswith(names) for layer in self.layers for path, _ in layer)


def param_scale_shape(
    extents: Sequence[int],
    shares: Sequence[int],
    *,
    lead: int,
    over: int,
    format: QuantizationFormat,
    alignment: BlockAlignment,
) -> tuple[int, ...]:
    """Return the shape of a parameter's scales: the number of blocks along each dim.

    extents: shape of the parameter; its first `lead` dims index matrices, the next `over` dims are inputs, and the
    others are outputs. shares: extents of one device's shard; blocks divide them, so that scales are sharded like their
    numbers.
    Blocks divide the last input dim and the last output dim. With format.inputs=None, a block instead covers all input
    dims of a shard.
    """
    blocks = [1] * len(extents)
    if format.inputs is None:
        blocks[lead : lead + over] = shares[lead : lead + over]
    else:
        blocks[lead + over - 1] = math.gcd(shares[lead + over - 1], alignment.inputs)
    blocks[-1] = math.gcd(shares[-1], alignment.outputs)
    return tuple(extent // block for extent, block in zip(extents, blocks, strict=True))

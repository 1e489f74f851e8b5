"""Formats in which matrices are kept: numbers of few bits, blocks of which share a scale. Holds no array."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NumberDtype = Literal["int8", "float8_e4m3fn", "mxfp4"]
QuantMethod = Literal["fp8", "compressed-tensors", "mxfp4", "modelopt"]

QUANTIZATION_CONFIG = "quantization_config"  # of config.json: the format its weights are published in
# What the largest number of a block or a row becomes.
QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True, kw_only=True)
class QuantizationFormat:
    """Numbers of a matrix [out, in] and scales of its blocks; a value is number * scale.

    dtype: mxfp4 has numbers of 4 bits (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two to a byte along the
    inputs, the low half first, and scales of 8 bits that mean 2**(s - 127). Scales of the others are float32.
    inputs, outputs: of a block, which starts at a multiple of them; inputs=None means all inputs of an output.
    Source: OCP Microscaling Formats 1.0 for mxfp4; DeepSeek-V3 (arXiv 2412.19437) for blocks.
    """

    dtype: NumberDtype
    inputs: int | None
    outputs: int

    @property
    def stored_dtype(self) -> str:
        """Of arrays that hold the numbers, or their bits (ops/quantized_matmul.py says why)."""
        return "int8" if self.dtype == "int8" else "uint8"

    @property
    def scale_dtype(self) -> str:
        """Of arrays that hold the scales."""
        return "uint8" if self.dtype == "mxfp4" else "float32"

    @property
    def packing_factor(self) -> int:
        """Numbers in one item of stored_dtype, along the inputs."""
        return 2 if self.dtype == "mxfp4" else 1

    @property
    def name(self) -> str:
        """As people call it: fp8, int8, mxfp4 or nvfp4, whatever its blocks."""
        return "nvfp4" if self == NVFP4 else {"float8_e4m3fn": "fp8"}.get(self.dtype, self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """What --weights-dtype may call it."""
        return (self.name, f"{self.name}-block") if self.inputs and self.packing_factor == 1 else (self.name,)


MXFP4 = QuantizationFormat(dtype="mxfp4", inputs=32, outputs=1)
# As much room as NVIDIA's FP4 with a scale of 8 bits for 16 numbers; planned with, not run.
NVFP4 = QuantizationFormat(dtype="mxfp4", inputs=16, outputs=1)
# What plain matrices can be turned into while they are loaded, by what users call it.
FORMATS: Mapping[str, QuantizationFormat] = MappingProxyType({
    "int8": QuantizationFormat(dtype="int8", inputs=None, outputs=1),
    "fp8": QuantizationFormat(dtype="float8_e4m3fn", inputs=None, outputs=1),
    "int8-block": QuantizationFormat(dtype="int8", inputs=128, outputs=128),
    "fp8-block": QuantizationFormat(dtype="float8_e4m3fn", inputs=128, outputs=128),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointQuantization:
    """How a checkpoint's files hold its quantized matrices. ignored: names and patterns of modules that are plain."""

    method: QuantMethod
    format: QuantizationFormat
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockAlignment:
    """Of one parameter: what extents of its blocks along inputs and outputs must divide, so that no block of the
    parameter reaches over two of the checkpoint's: 0 where there is only one."""

    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class WeightQuantization:
    """What a model keeps quantized. layers: of each layer, the parameters that are, by their paths within its block
    (as "attention/qkv"), in order."""

    format: QuantizationFormat
    layers: tuple[tuple[tuple[str, BlockAlignment], ...], ...]

    def of(self, layer: int) -> Mapping[str, BlockAlignment]:
        """The parameters of a layer that are quantized."""
        return dict(self.layers[layer])

    def holds(self, *names: str) -> bool:
        """Whether any parameter so named, by the first parts of its path, is quantized in any layer."""
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
    """The shape of a parameter's scales: along each dim, how many blocks there are.

    extents: of the parameter, whose first `lead` dims are of matrices, the next `over` of inputs, the others of
    outputs. shares: one device's part of each; blocks divide it, so that scales split as the numbers they belong to.
    Blocks lie along the last dim of inputs and of outputs; a scale for all inputs holds for all dims of them.
    """
    blocks = [1] * len(extents)
    if format.inputs is None:
        blocks[lead : lead + over] = shares[lead : lead + over]
    else:
        blocks[lead + over - 1] = math.gcd(shares[lead + over - 1], alignment.inputs)
    blocks[-1] = math.gcd(shares[-1], alignment.outputs)
    return tuple(extent // block for extent, block in zip(extents, blocks, strict=True))

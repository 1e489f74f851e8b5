"""Writing quantized checkpoints: which tensors of a plain one become numbers and scales, and what config.json says.

What is written is what families/quantization_reader.py reads. Activations are said to be quantized token by token, as
published recipes do and the kernels of vLLM for these formats need; no model here does that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.quantization_reader import quantized_slices, with_weights_dtype
from jaxmoe.quantization.formats import FORMATS, CheckpointQuantization, QuantMethod

# The published form of each of FORMATS that has one which vLLM and transformers read.
METHODS: dict[str, QuantMethod] = {"int8": "compressed-tensors", "fp8": "compressed-tensors", "fp8-block": "fp8"}
_KINDS = {"int8": ("int", "int-quantized"), "float8_e4m3fn": ("float", "float-quantized")}


def quantized_keys(config: ModelConfig, weights_dtype: str, names: CheckpointKeys) -> set[str]:
    """The tensors of a plain checkpoint that are quantized in one of METHODS: those that are on load.

    Raises: ConfigError for another weights_dtype, a checkpoint that is quantized already, or one that has the matrices
    of all experts in one tensor, where these forms have one matrix a tensor.
    """
    if weights_dtype not in METHODS:
        raise ConfigError(
            f"weights_dtype={weights_dtype} has no checkpoint format that can be written: choose one of "
            f"{', '.join(METHODS)}, or keep the plain checkpoint and quantize it on load"
        )
    kept = quantized_slices(with_weights_dtype(config, weights_dtype, names), names)
    if fused := next((weight_slice.key for weight_slice in kept if len(weight_slice.key_shape) != 2), None):
        raise ConfigError(
            f"the checkpoint of family {config.family} holds the matrices of all experts in one tensor ({fused}), "
            f"{', '.join(METHODS)} are written of one matrix a tensor: keep the plain one and quantize it on load"
        )
    return {weight_slice.key for weight_slice in kept}


def written_as(weights_dtype: str, plain: Iterable[str]) -> CheckpointQuantization:
    """The form that one of METHODS is written in. plain: modules that are not quantized."""
    return CheckpointQuantization(
        method=METHODS[weights_dtype], format=FORMATS[weights_dtype], ignored=tuple(sorted(plain))
    )


def quantization_config(quant_config: CheckpointQuantization) -> dict[str, Any]:
    """What config.json says of a form of METHODS."""
    form, ignored = quant_config.format, list(quant_config.ignored)
    if quant_config.method == "fp8":
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [form.outputs, form.inputs], "modules_to_not_convert": ignored,
        }  # fmt: skip
    kind, name = _KINDS[form.dtype]
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"], "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True}, "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored,
    }  # fmt: skip

"""Writing of quantized checkpoints: which tensors are quantized, and the quantization_config of config.json.

families/quantization_reader.py reads these checkpoints. config.json declares activations quantized per token, as
published recipes do and vLLM's kernels for these formats need; no model here quantizes activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.quantization_reader import quantized_slices, with_weights_dtype
from jaxmoe.quantization.formats import FORMATS, CheckpointQuantization, QuantMethod

# The quant_method of the FORMATS that vLLM and transformers can read.
METHODS: dict[str, QuantMethod] = {"int8": "compressed-tensors", "fp8": "compressed-tensors", "fp8-block": "fp8"}
_KINDS = {"int8": ("int", "int-quantized"), "float8_e4m3fn": ("float", "float-quantized")}


def quantized_keys(config: ModelConfig, weights_dtype: str, names: CheckpointKeys) -> set[str]:
    """Return the tensors of an unquantized checkpoint that are quantized in weights_dtype.

    They are the same tensors that are quantized on load.
    Raises: ConfigError for a weights_dtype not in METHODS, a checkpoint that is already quantized, or one that stores
    all experts in one tensor, because these formats store one matrix per tensor.
    """
    if weights_dtype not in METHODS:
        raise ConfigError(
            f"weights_dtype={weights_dtype} has no checkpoint format that can be written: choose one of "
            f"{', '.join(METHODS)}, or keep the checkpoint unquantized and quantize it on load"
        )
    kept = quantized_slices(with_weights_dtype(config, weights_dtype, names), names)
    if fused := next((weight_slice.key for weight_slice in kept if len(weight_slice.key_shape) != 2), None):
        raise ConfigError(
            f"the checkpoint of family {config.family} holds the matrices of all experts in one tensor ({fused}), "
            f"but {', '.join(METHODS)} need one matrix per tensor: keep it unquantized and quantize it on load"
        )
    return {weight_slice.key for weight_slice in kept}


def written_as(weights_dtype: str, plain: Iterable[str]) -> CheckpointQuantization:
    """Return the quantization of a checkpoint written in one of METHODS. plain: modules that are not quantized."""
    return CheckpointQuantization(
        method=METHODS[weights_dtype], format=FORMATS[weights_dtype], ignored=tuple(sorted(plain))
    )


def quantization_config(quant_config: CheckpointQuantization) -> dict[str, Any]:
    """Return the quantization_config of config.json for a quantization in METHODS."""
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

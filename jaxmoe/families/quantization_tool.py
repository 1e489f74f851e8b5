"""Detection of the tool that quantized a checkpoint, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import ConfigError
from jaxmoe.families.reader import shown
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG

# Other keys that describe quantized weights: MLX's key (which NVIDIA's tools used, too), and the key of
# compressed-tensors before it moved into quantization_config.
_OTHER_KEYS = ("quantization", "compression_config")
QUANTIZATION_KEYS = (QUANTIZATION_CONFIG, *_OTHER_KEYS)
# Settings that only one tool writes. Any one of them identifies the tool; MLX needs all of its settings.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NVIDIA ModelOpt", ("quant_algo",)),
    ("compressed-tensors", ("config_groups", "quantization_status")),
    ("AMD Quark", ("global_quant_config", "layer_quant_config")),
    ("bitsandbytes", ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "llm_int8_threshold")),
    ("GPTQ", ("desc_act", "damp_percent", "true_sequential")),
    ("AWQ", ("w_bit", "q_group_size", "zero_point")),
    ("fine-grained FP8", ("weight_block_size", "activation_scheme")),
)
_MLX = ("group_size", "bits")


def quantization_key(raw: Mapping[str, Any]) -> str | None:
    """Return the key of a config.json that describes quantized weights, or None if they are unquantized."""
    if raw.get(QUANTIZATION_CONFIG) not in (None, {}):
        return QUANTIZATION_CONFIG
    return next((key for key in _OTHER_KEYS if raw.get(key)), None)


def without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the keys that describe quantized weights."""
    return {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}


def quantizer_name(value: Any) -> str:
    """Return the name of the tool that wrote a description of quantized weights.

    It is the quant_method, else the producer's name, else the tool that writes these settings.
    """
    if not isinstance(value, Mapping):
        return _printable(value)
    if value.get("quant_method") is not None:
        return _printable(value["quant_method"])
    producer = value.get("producer")
    if isinstance(producer, Mapping) and isinstance(producer.get("name"), str):
        return _printable(producer["name"])
    for name, keys in _SIGNS:
        if any(key in value for key in keys):
            return name
    if all(key in value for key in _MLX):
        return "MLX"
    return f"an unnamed tool (settings {', '.join(sorted(map(_printable, value))[:6])})"


def _printable(name: Any) -> str:
    """Return a name unchanged if it fits on one line, else as a quoted string."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else shown(name)


def check_other_keys(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError if a key other than quantization_config describes quantized weights."""
    for key in _OTHER_KEYS:
        if raw.get(key):
            raise ConfigError(
                f"config key {key!r} = {shown(raw[key])} is the format of {quantizer_name(raw[key])}, which is not "
                f"supported: use the checkpoint that it was made from"
            )

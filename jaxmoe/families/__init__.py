"""Registry of the model families, by the model_type of config.json.

To add a family, add a file to this package and list it below.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from jaxmoe.config import CheckpointLayout, ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families import (
    deepseek,
    glm4_moe,
    gpt_oss,
    llama,
    llama4,
    mistral,
    mixtral,
    olmoe,
    quantization_reader,
    quantization_writer,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.keys import may_stand_unused, weight_slices
from jaxmoe.families.quantization_reader import read_quantization_config, with_checkpoint_quantization
from jaxmoe.families.quantization_tool import (
    QUANTIZATION_KEYS,
    check_other_keys,
    quantization_key,
    quantizer_name,
    without_quantization,
)
from jaxmoe.families.reader import ConfigReader, shown
from jaxmoe.families.refused import foreign_keys, noted, refusal, suspicious_keys
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG
from jaxmoe.weight_slice import WeightSlice

_OF_ONE_NAME = (llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, olmoe, gpt_oss, glm4_moe)
FAMILIES: dict[str, ModelFamily] = {
    family.name: family
    for family in (*(module.FAMILY for module in _OF_ONE_NAME), *deepseek.FAMILIES, *llama4.FAMILIES)
}

_DTYPE_KEYS = ("torch_dtype", "dtype")
# Name endings of the tensors that models store in float32 regardless of their dtype (parameters.py).
_EXACT = tuple({f".{family.names.selection_bias}" for family in FAMILIES.values() if family.names.selection_bias})

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "WeightSlice",
    "check_other_keys",
    "is_exact",
    "may_stand_unused",
    "quantization_key",
    "quantized_keys",
    "quantizer_name",
    "read_config",
    "read_quantization_config",
    "states_dtype",
    "weight_slices",
    "with_layout",
    "with_weights_dtype",
    "without_quantization",
]


def read_config(
    raw: Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
    planned: bool = False,
    not_understood: list[str] | None = None,
) -> ModelConfig:
    """Return the ModelConfig of a parsed config.json.

    ignore: keys to ignore even if they are unknown. planned: whether to accept also a weight format that the planner
    supports but that cannot be run. not_understood: for reports on a model that is not run, a list of the
    unsupported settings, as "key = value". They are appended to it instead of being an error if they may change the
    computation but no array size.
    Raises: ConfigError for an unknown model_type, a bad value, a key that may change the computation, or an ignored key
    that config.json does not have.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"config.json has model_type {shown(name)}, which is not a supported family; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    quant_config = read_quantization_config(raw.get(QUANTIZATION_CONFIG), planned=planned)
    check_other_keys(raw)
    text = _of_text(raw, family.part)
    ignored = [ignore] if isinstance(ignore, str) else list(ignore)
    _check_ignored(ignored, {QUANTIZATION_CONFIG, *raw, *text})
    reader = ConfigReader(text, ignore=[*QUANTIZATION_KEYS, *ignored], lenient=not_understood is not None)
    foreign = {**foreign_keys(text, family), **foreign_keys(raw, family)}
    refused = {key: value for key, value in foreign.items() if key not in ignored}
    _check_causal(reader)
    try:
        config = family.read(reader)
    except ConfigError as error:
        if refused and not_understood is None:  # a different model explains the error better
            raise refusal(family, refused) from error
        raise
    refused |= suspicious_keys(reader)
    if not_understood is not None:
        unknown_keys = {**reader.passed_over, **refused}
        not_understood += noted(unknown_keys)
    elif refused:
        raise refusal(family, refused)
    return with_checkpoint_quantization(config, quant_config, family.names)


def _check_causal(reader: ConfigReader) -> None:
    """Raise ConfigError unless is_causal is true or absent: transformers otherwise attends in both directions."""
    if reader.get("is_causal", False, absent=True) is not True:
        stated = reader.stated("is_causal")
        reader.unsupported(
            "is_causal",
            stated,
            f"config key 'is_causal' = {shown(stated)} makes attention bidirectional, as embedding models have it; "
            f"only causal attention is supported: use a language model",
        )


def states_dtype(raw: Mapping[str, Any]) -> bool:
    """Return whether the parsed config.json of a known family gives the dtype of its weights."""
    text = _of_text(raw, FAMILIES[raw["model_type"]].part)
    return any(text.get(key) is not None for key in _DTYPE_KEYS)


def with_layout(config: ModelConfig, layout: CheckpointLayout) -> ModelConfig:
    """Return the config for a checkpoint stored in another layout.

    The stored tensors determine which parameters stay quantized.
    """
    if layout == config.checkpoint:
        return config
    plain = replace(config, checkpoint=layout, checkpoint_quantization=None, quantization=None)
    return with_checkpoint_quantization(plain, config.checkpoint_quantization, FAMILIES[config.family].names)


def is_exact(key: str) -> bool:
    """Return whether models store a tensor in float32 regardless of their dtype.

    The tensor may belong to a layer that this package does not run.
    """
    return key.endswith(_EXACT)


def with_weights_dtype(config: ModelConfig, weights_dtype: str | None) -> ModelConfig:
    """Return the config of a model with matrices in weights_dtype; see families/quantization_reader.py."""
    return quantization_reader.with_weights_dtype(config, weights_dtype, FAMILIES[config.family].names)


def quantized_keys(config: ModelConfig, weights_dtype: str) -> set[str]:
    """Return the tensors of an unquantized checkpoint to quantize; see families/quantization_writer.py."""
    return quantization_writer.quantized_keys(config, weights_dtype, FAMILIES[config.family].names)


def _check_ignored(ignored: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError for an ignored key that config.json does not have."""
    for key in ignored:
        if key not in known:
            near = "".join(f", did you mean {shown(one)}?" for one in difflib.get_close_matches(key, known, 1))
            raise ConfigError(f"--ignore-config-key {shown(key)} is not a key of config.json: remove the option{near}")


def _of_text(raw: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """Return the text model's config; without a dtype of its own it takes the dtype of the whole file."""
    if part is None:
        return raw
    text = raw.get(part)
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json of family {raw['model_type']!r} has no object {part!r}: add it")
    if text.get(QUANTIZATION_CONFIG) is not None:
        raise ConfigError(
            f"config key {QUANTIZATION_CONFIG!r} is in {part!r}, where it is not read: move it to the top level of "
            f"config.json"
        )
    check_other_keys(text)
    outer = {} if any(text.get(key) is not None for key in _DTYPE_KEYS) else {key: raw.get(key) for key in _DTYPE_KEYS}
    return {**text, **outer}

"""Model families by config.json's model_type. Adding one adds a file here and a name to this list."""

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
# What models hold in float32 whatever their dtype (model/params.py, ParamFactory.exact), by the ends of its names.
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
    """The ModelConfig of a parsed config.json.

    ignore: keys to pass over although they are not understood. planned: also of a checkpoint whose format of weights
    is planned with and cannot be run. not_understood: a list that receives "key = value" of each setting that may
    change the computation, and no size, in place of an error: for reports on a model that is not run.
    Raises: ConfigError for an unknown model_type, a bad value, a key that may change the maths, or one to ignore that
    is not there.
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
        if refused and not_understood is None:  # of two faults that of another model altogether
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
    """Raise a ConfigError where is_causal is anything but true: transformers then attends in both directions."""
    if reader.get("is_causal", False, absent=True) is not True:
        stated = reader.stated("is_causal")
        reader.unsupported(
            "is_causal",
            stated,
            f"config key 'is_causal' = {shown(stated)} makes attention bidirectional, as embedding models have it; "
            f"only causal attention is supported: use a language model",
        )


def states_dtype(raw: Mapping[str, Any]) -> bool:
    """Return whether a parsed config.json of a known family gives the dtype of its weights."""
    text = _of_text(raw, FAMILIES[raw["model_type"]].part)
    return any(text.get(key) is not None for key in _DTYPE_KEYS)


def with_layout(config: ModelConfig, layout: CheckpointLayout) -> ModelConfig:
    """Return the config of a checkpoint stored in a layout. What it keeps quantized follows the stored tensors."""
    if layout == config.checkpoint:
        return config
    plain = replace(config, checkpoint=layout, checkpoint_quantization=None, quantization=None)
    return with_checkpoint_quantization(plain, config.checkpoint_quantization, FAMILIES[config.family].names)


def is_exact(key: str) -> bool:
    """Whether a tensor is of what models hold in float32 whatever their dtype, be it of a layer that none here runs."""
    return key.endswith(_EXACT)


def with_weights_dtype(config: ModelConfig, weights_dtype: str | None) -> ModelConfig:
    """The config of a model that keeps matrices as asked: see families/quantization_reader.py."""
    return quantization_reader.with_weights_dtype(config, weights_dtype, FAMILIES[config.family].names)


def quantized_keys(config: ModelConfig, weights_dtype: str) -> set[str]:
    """The tensors of a plain checkpoint that are quantized: see families/quantization_writer.py."""
    return quantization_writer.quantized_keys(config, weights_dtype, FAMILIES[config.family].names)


def _check_ignored(ignored: Iterable[str], known: Collection[str]) -> None:
    """Raise a ConfigError for a key that is to be passed over and is not there."""
    for key in ignored:
        if key not in known:
            near = "".join(f", did you mean {shown(one)}?" for one in difflib.get_close_matches(key, known, 1))
            raise ConfigError(f"--ignore-config-key {shown(key)} names no key of config.json: leave it out{near}")


def _of_text(raw: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """The text model's config, with what the whole file says of its numbers."""
    if part is None:
        return raw
    text = raw.get(part)
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json of family {raw['model_type']!r} has no object {part!r}: add it")
    if text.get(QUANTIZATION_CONFIG) is not None:
        raise ConfigError(
            f"config key {QUANTIZATION_CONFIG!r} stands in {part!r}, where it is not looked for: move it to the top of "
            f"config.json"
        )
    check_other_keys(text)
    outer = {} if any(text.get(key) is not None for key in _DTYPE_KEYS) else {key: raw.get(key) for key in _DTYPE_KEYS}
    return {**text, **outer}

"""Model families by config.json's model_type. Adding one adds a file here and a name to this list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families import llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe
from jaxmoe.families.family import Family
from jaxmoe.families.keys import Piece, may_stand_unused, pieces
from jaxmoe.families.reader import ConfigReader

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, olmoe)
}

__all__ = ["FAMILIES", "Family", "Piece", "may_stand_unused", "pieces", "read_config"]


def read_config(raw: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a parsed config.json.

    ignore: keys to pass over although they are not understood.
    Raises: ConfigError for an unknown model_type, a bad value, or a key that may change the maths.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"config.json has model_type {name!r}, which is not a supported family; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if quantised := raw.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            f"config key 'quantization_config' has quant_method {how!r}; only unquantised weights "
            f"(bfloat16, float16, float32) are supported: use an unquantised checkpoint"
        )
    reader = ConfigReader(raw, ignore=[ignore] if isinstance(ignore, str) else ignore)
    config = FAMILIES[name].read(reader)
    reader.finish(name)
    return config

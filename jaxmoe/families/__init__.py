"""Model families by config.json's model_type. Adding one adds a file here and a name to this list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families import llama, mistral, mixtral, olmoe, quantised, qwen2, qwen2_moe, qwen3, qwen3_moe
from jaxmoe.families.family import Family
from jaxmoe.families.keys import Piece, may_stand_unused, pieces
from jaxmoe.families.quantised import as_published, read_published
from jaxmoe.families.reader import ConfigReader

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, olmoe)
}

__all__ = ["FAMILIES", "Family", "Piece", "may_stand_unused", "pieces", "read_config", "with_weights_dtype"]


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
    published = read_published(raw.get("quantization_config"))
    ignored = [ignore] if isinstance(ignore, str) else ignore
    reader = ConfigReader(raw, ignore=["quantization_config", *ignored])
    config = FAMILIES[name].read(reader)
    reader.finish(name)
    return as_published(config, published, FAMILIES[name].names)


def with_weights_dtype(config: ModelConfig, weights_dtype: str | None) -> ModelConfig:
    """The config of a model that keeps matrices as asked: see families/quantised.py."""
    return quantised.with_weights_dtype(config, weights_dtype, FAMILIES[config.family].names)

"""What one file of a model family provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxmoe.config import ModelConfig
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import ConfigReader


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """name is config.json's model_type; read turns its keys into a ModelConfig; names are its tensor keys.

    architectures: what config.json calls its causal language model. part: the key of config.json whose object is the
    text model's, where there are other models beside it. own_code: whether published files point to modeling code of
    their own that this family is read from.
    """

    name: str
    read: Callable[[ConfigReader], ModelConfig]
    architectures: tuple[str, ...]
    names: CheckpointKeys = CheckpointKeys()
    part: str | None = None
    own_code: bool = False

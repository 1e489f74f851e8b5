"""Interface that the file of each model family implements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxmoe.config import ModelConfig
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import ConfigReader


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Describe one model family.

    name: model_type of config.json. read: turns the keys of config.json into a ModelConfig. names: tensor keys of its
    checkpoints. architectures: names of its causal language model in config.json. part: key of the text model's object
    in config.json, if the file describes other models too. own_code: whether published checkpoints point to custom
    modeling code on which this family is based.
    """

    name: str
    read: Callable[[ConfigReader], ModelConfig]
    architectures: tuple[str, ...]
    names: CheckpointKeys = CheckpointKeys()
    part: str | None = None
    own_code: bool = False

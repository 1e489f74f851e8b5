"""How many parameters a model has, in which parts, and what a token's keys and values take: from its config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.depth import segments
from jaxmoe.families import FAMILIES, pieces

Part = Literal["embedding", "attention", "dense mlp", "router", "experts", "shared expert", "norms", "head"]
PARTS: tuple[Part, ...] = (
    "embedding", "attention", "dense mlp", "router", "experts", "shared expert", "norms", "head",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One published tensor: its key, its shape, and the part of the model it belongs to."""

    key: str
    shape: tuple[int, ...]
    part: Part

    @property
    def num_params(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


def published_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of plain numbers, once, in the order of the layers."""
    parts = segments(config, "scan")
    seen: set[str] = set()
    for piece in pieces(config, [ArraySizes.unpadded(config)] * len(parts), FAMILIES[config.family].names, parts):
        if piece.key not in seen:
            seen.add(piece.key)
            yield Tensor(key=piece.key, shape=piece.key_shape, part=_part(piece.path))


def _part(path: str) -> Part:
    """Of the parameter at a path."""
    outside: dict[str, Part] = {"embed": "embedding", "head": "head", "final_norm": "norms"}
    if path in outside:
        return outside[path]
    inside = path.split("/")[3:]
    if inside[-1].endswith("norm"):
        return "norms"
    if inside[0] == "moe":
        shared = inside[1].startswith("shared")
        experts = inside[1] in ("experts", "down_bias")
        return "shared expert" if shared else "experts" if experts else "router"
    return "attention" if inside[0] == "attention" else "dense mlp"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model: by part; those in all; those that work for one token, embedding and head included."""

    by_part: dict[Part, int]
    total: int
    active: int


def count_parameters(config: ModelConfig) -> Counts:
    """The parameters of a model."""
    by_part: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for tensor in published_tensors(config):
        by_part[tensor.part] += tensor.num_params
    total, idle, moe = sum(by_part.values()), 0, config.moe
    if moe is not None:
        idle = by_part["experts"] // moe.num_experts * (moe.num_experts - moe.num_experts_per_tok)
    return Counts(by_part={part: count for part, count in by_part.items() if count}, total=total, active=total - idle)


def kv_numbers(config: ModelConfig) -> int:
    """Numbers of keys and values of one token, of all layers, where no head is held twice."""
    return config.num_hidden_layers * config.num_key_value_heads * sum(config.cached_dims)

"""How a model's layers lie: in segments of alike layers whose weights are stacked, or every layer by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ModelConfig

LayersKind = Literal["scan", "unroll"]
LAYERS_KINDS: tuple[LayersKind, ...] = ("scan", "unroll")
_LONGEST_PERIOD = 8


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`period` layers that may differ, `repeats` times over, from layer `first` on.

    The model holds it as `period` blocks whose arrays have a leading dim of `repeats`: layer first + r * period + b is
    index r of block b. Where repeats is above 1 its program is compiled once and run in a loop.
    """

    first: int
    period: int
    repeats: int

    @property
    def num_layers(self) -> int:
        """Layers of the model in it."""
        return self.period * self.repeats

    def layers(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.num_layers)


def segments(config: ModelConfig, kind: LayersKind) -> tuple[Segment, ...]:
    """The segments of a model, first to last. unroll: one a layer; scan: as long as layers repeat."""
    kinds = list(zip(config.moe_layers, config.sliding_windows, strict=True))  # all in which layers differ
    found, at = [], 0
    while at < len(kinds):
        period, repeats = _longest_run(kinds[at:]) if kind == "scan" else (1, 1)
        found.append(Segment(first=at, period=period, repeats=repeats))
        at += period * repeats
    return tuple(found)


def _longest_run(kinds: list[tuple[bool, int | None]]) -> tuple[int, int]:
    """(period, repeats) that cover the most layers from the first on; (1, 1) where nothing repeats."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_PERIOD, len(kinds) // 2) + 1):
        alike = period
        while alike < len(kinds) and kinds[alike] == kinds[alike - period]:
            alike += 1
        repeats = alike // period
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def place_of(layer: int, parts: tuple[Segment, ...]) -> tuple[str, int]:
    """(path of the block, index in its leading dim) of a layer's parameters. Raises: ValueError if no part has it."""
    for number, part in enumerate(parts):
        if layer in part.layers():
            repeat, block = divmod(layer - part.first, part.period)
            return f"segments/{number}/{block}", repeat
    raise ValueError(f"layer {layer} is in none of {parts}")

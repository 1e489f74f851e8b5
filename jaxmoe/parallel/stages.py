"""Layer segments and the pipeline schedule.

A segment is a run of repeating layers with stacked weights, or a single layer. The stages of a pipeline share one
segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError

LayersMode = Literal["scan", "unroll"]
LAYERS_MODES: tuple[LayersMode, ...] = ("scan", "unroll")
_MAX_PERIOD = 8
_MAX_UNROLLED = 4


@dataclass(frozen=True, kw_only=True)
class LayerSegment:
    """Describe a run of `period` layers, which may differ, repeated `repeats` times from layer `first` on.

    The model stores a segment as `period` blocks whose arrays have a leading dim of `slots`: layer first + r * period +
    b is the r-th of filled_slots() in block b. A segment with several repeats is compiled once and run in a loop.

    The repeats are distributed over `stages` pipeline stages, in `virtual_stages` runs each. A token passes all stages
    `virtual_stages` times. If the repeats do not divide evenly, unused slots hold zeros.
    """

    first: int
    period: int
    repeats: int
    stages: int = 1
    virtual_stages: int = 1

    @property
    def num_layers(self) -> int:
        """Return the number of layers in the segment."""
        return self.period * self.repeats

    def layers(self) -> range:
        """Return the layer indices of the segment."""
        return range(self.first, self.first + self.num_layers)

    @property
    def virtual_stage_slots(self) -> int:
        """Return the number of slots in every virtual stage of every stage."""
        return -(-self.repeats // (self.stages * self.virtual_stages))

    @property
    def slots(self) -> int:
        """Return the number of slots over all stages."""
        return self.stages * self.virtual_stages * self.virtual_stage_slots

    def filled(self, stage: Any, virtual_stage: Any) -> Any:
        """Return how many slots of one virtual stage of one stage are filled. Takes numbers or arrays.

        The counts differ by at most one; the first virtual stages have more.
        """
        each, left = divmod(self.repeats, self.stages * self.virtual_stages)
        return each + (virtual_stage * self.stages + stage < left)

    def filled_slots(self) -> Iterator[int]:
        """Yield the slot of every repeat in layer order."""
        for virtual_stage in range(self.virtual_stages):
            for stage in range(self.stages):
                start = (stage * self.virtual_stages + virtual_stage) * self.virtual_stage_slots
                yield from range(start, start + self.filled(stage, virtual_stage))


@lru_cache(maxsize=256)
def layer_segments(
    config: ModelConfig, mode: LayersMode, *, stages: int = 1, virtual_stages: int = 1
) -> tuple[LayerSegment, ...]:
    """Return the segments of a model in order.

    Mode "unroll" gives one segment per layer; "scan" gives the longest runs of repeating layers. With several stages,
    the segments are those of "scan" and the stages share the longest one. The other segments run outside the pipeline.
    Raises: ConfigError if the longest segment has too few repeats.
    """
    kinds = [config.kind(layer) for layer in range(config.num_hidden_layers)]
    groups: list[LayerSegment] = []
    at = 0
    while at < len(kinds):
        period, repeats = _longest_run(kinds[at:]) if mode == "scan" or stages > 1 else (1, 1)
        groups.append(LayerSegment(first=at, period=period, repeats=repeats))
        at += period * repeats
    if stages > 1:
        longest = max(groups, key=lambda segment: segment.num_layers)
        if stages * virtual_stages > longest.repeats:
            alike = "layers" if longest.period == 1 else f"groups of {longest.period} layers"
            interleaved = f" in {virtual_stages} virtual stages each" if virtual_stages > 1 else ""
            raise ConfigError(
                f"pipeline={stages}{interleaved} needs at least {stages * virtual_stages} identical consecutive "
                f"{alike}, the model has {longest.repeats}: use fewer stages"
            )
        groups[groups.index(longest)] = replace(longest, stages=stages, virtual_stages=virtual_stages)
    return tuple(groups)


def _longest_run(kinds: list[tuple[object, ...]]) -> tuple[int, int]:
    """Return (period, repeats) that cover the most layers from the first on; (1, 1) if no layers repeat."""
    best = (1, 1)
    for period in range(1, min(_MAX_PERIOD, len(kinds) // 2) + 1):
        alike = period
        while alike < len(kinds) and kinds[alike] == kinds[alike - period]:
            alike += 1
        repeats = alike // period
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


@dataclass(frozen=True, kw_only=True)
class LayerLocation:
    """Locate a layer's parameters: segment, block within it, and index into the leading dim of its arrays."""

    segment: int
    block: int
    slot: int

    @property
    def path(self) -> str:
        """Return the path of the block's parameters in the model."""
        return f"segments/{self.segment}/{self.block}"


def locate_layer(layer: int, segments: tuple[LayerSegment, ...]) -> LayerLocation:
    """Return the location of a layer. Raises: ValueError if no segment contains it."""
    for number, segment in enumerate(segments):
        if layer in segment.layers():
            repeat, block = divmod(layer - segment.first, segment.period)
            return LayerLocation(segment=number, block=block, slot=list(segment.filled_slots())[repeat])
    raise ValueError(f"layer {layer} is in none of {segments}")


class PipelineSlot(NamedTuple):
    """Describe the work of one stage in one tick: one micro-batch through one virtual stage.

    The fields are integers or arrays of integers. If valid is False, the other fields are meaningless.
    """

    decode_step: Any
    virtual_stage: Any
    micro_batch: Any
    valid: Any


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """Order micro-batches over pipeline stages: all of them pass one virtual stage, then the next.

    A tick is the time of one micro-batch in one virtual stage of one stage. A micro-batch reaches the next stage one
    tick later. After the last stage it goes to the first stage's next virtual stage, and after the last virtual stage
    to its next decode step. With fewer micro-batches than stages, stages idle until it returns.
    Source: interleaved schedules of Megatron-LM (arXiv 2104.04473), forward only.
    """

    stages: int = 1
    virtual_stages: int = 1
    micro_batches: int = 1

    @property
    def period(self) -> int:
        """Return the number of ticks between two virtual stages of one micro-batch on one stage."""
        return max(self.stages, self.micro_batches)

    def ticks(self, decode_steps: Any = 1) -> Any:
        """Return the number of ticks until all micro-batches have passed all decode steps."""
        return (decode_steps * self.virtual_stages - 1) * self.period + self.micro_batches + self.stages - 1

    def slot(self, tick: Any, stage: Any, decode_steps: Any = 1) -> PipelineSlot:
        """Return the work of a stage in a tick."""
        step = tick - stage
        lap, micro_batch = step // self.period, step % self.period
        decode_step, virtual_stage = lap // self.virtual_stages, lap % self.virtual_stages
        return PipelineSlot(
            decode_step,
            virtual_stage,
            micro_batch,
            (step >= 0) & (micro_batch < self.micro_batches) & (decode_step < decode_steps),
        )

    def idle(self, decode_steps: int = 1) -> Fraction:
        """Return the fraction of all stages' ticks that are idle (the pipeline bubble)."""
        return 1 - Fraction(decode_steps * self.virtual_stages * self.micro_batches, self.ticks(decode_steps))

    def sends(self, tick: int, decode_steps: int = 1) -> list[tuple[int, int]]:
        """Return the (source, destination) stages that transfer hidden states in a tick.

        A stage sends only if its micro-batch of the tick before was valid.
        The last stage sends only if a virtual stage remains.
        """
        ring = [(stage, (stage + 1) % self.stages) for stage in range(self.stages)]
        slots = [(pair, self.slot(tick - 1, pair[0], decode_steps)) for pair in ring]
        return [
            pair for pair, slot in slots if slot.valid and (pair[1] > 0 or slot.virtual_stage + 1 < self.virtual_stages)
        ]

    @staticmethod
    def unrolled(ticks: int, *, alone: bool) -> bool:
        """Return whether ticks are compiled separately, so that idle stages send nothing. Only few ticks are.

        alone: whether all layers are inside the stages. The compiler would merge the collectives of other layers across
        ticks.
        """
        return alone and ticks <= _MAX_UNROLLED


def check_virtual_stages(virtual_stages: int, *, stages: int) -> None:
    """Raises: ConfigError for a number of virtual stages that the pipeline cannot have."""
    if type(virtual_stages) is not int or virtual_stages < 1:
        raise ConfigError(f"virtual_stages={virtual_stages!r} must be a whole number of at least 1")
    if virtual_stages > 1 and stages == 1:
        raise ConfigError(
            f"virtual_stages={virtual_stages} needs stages: the mesh has pipeline=1; remove the option or add stages"
        )

"""Layouts: which mesh axes share out the tokens, the insides of layers, and the experts. The pipeline axis is no
layout's business: it shares out layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from jaxmoe.errors import LayoutError
from jaxmoe.mesh import AXES

Axes = tuple[str, ...]
_FREE_AXES = tuple(axis for axis in AXES if axis != "pipeline")


@dataclass(frozen=True)
class Layout:
    """Every axis but the pipeline's, by what it shares out.

    batch: tokens. split: heads, widths of dense layers and of a shared expert, vocabulary; an all-reduce each.
    experts: whole experts; along axes of the batch tokens are exchanged, along those of split every rank has them all.
    expert_width: each expert. Raises: LayoutError for an axis that is unknown, used twice, or of no use.
    """

    batch: Axes
    split: Axes
    experts: Axes
    expert_width: Axes

    def __post_init__(self) -> None:
        for one in fields(self):
            axes = getattr(self, one.name)
            for axis in axes:
                if axis not in _FREE_AXES:
                    raise LayoutError(f"layout: {one.name}={axis!r} must be one of {', '.join(_FREE_AXES)}")
        for first, second in (("batch", "split"), ("experts", "expert_width")):
            both = (*getattr(self, first), *getattr(self, second))
            for axis in both:
                if both.count(axis) > 1:
                    raise LayoutError(f"layout uses axis {axis!r} twice in {first} and {second}: an axis splits once")
        if set(self.batch) | set(self.split) != set(_FREE_AXES):
            unused = next(axis for axis in _FREE_AXES if axis not in (*self.batch, *self.split))
            raise LayoutError(f"layout leaves axis {unused!r} without work: add it to batch or to split")
        if set(self.held) | set(self.expert_width) != set(self.split):
            raise LayoutError(
                f"layout splits layers over {'+'.join(self.split) or 'no axis'}, so experts and expert_width together "
                f"must hold these of the axes without a batch; they hold {'+'.join((*self.held, *self.expert_width))}"
            )
        if self.experts != (*self.exchanged, *self.held):
            raise LayoutError("layout: experts must name axes of the batch first")

    @property
    def exchanged(self) -> Axes:
        """Axes along which ranks have other tokens and other experts."""
        return tuple(axis for axis in self.experts if axis in self.batch)

    @property
    def held(self) -> Axes:
        """Axes along which ranks have the same tokens and other experts."""
        return tuple(axis for axis in self.experts if axis not in self.batch)

    @cached_property
    def table(self) -> Mapping[str, Axes]:
        """Logical dim -> mesh axes that split it; dims of layers lie over the pipeline."""
        whole = (
            "length", "width", "block", "page_token", "head_slot", "head_dim", "gate_or_up", "router_expert", "one",
        )  # fmt: skip
        return dict.fromkeys(whole, ()) | {
            "layer": ("pipeline",),
            "stage": ("pipeline",),
            "batch": self.batch,
            "page": self.batch,
            "vocab": self.split,
            "kv_head": self.split,
            "ffn": self.split,
            "moe_expert": self.experts,
            "moe_ffn": self.expert_width,
        }

    def used(self, mesh_axes: Mapping[str, int], *, moe: bool) -> tuple[Axes, ...]:
        """batch, split, experts and expert_width without axes of size 1, nor what no layer has: layouts of which this
        is equal place a model on the mesh alike."""
        parts = (self.batch, self.split, *((self.experts, self.expert_width) if moe else ()))
        return tuple(tuple(axis for axis in axes if mesh_axes.get(axis, 1) > 1) for axes in parts)

    def __str__(self) -> str:
        for name, known in LAYOUTS.items():
            if known == self:
                return name
        return ",".join(f"{one.name}={'+'.join(getattr(self, one.name))}" for one in fields(self))


LAYOUTS: dict[str, Layout] = {
    # experts on ranks that have other tokens, each expert split as the layers around it
    "ep-tp": Layout(batch=("data", "expert"), split=("tensor",), experts=("expert",), expert_width=("tensor",)),
    # split attention, whole experts on all of the same devices
    "tp-ep": Layout(batch=("data", "expert"), split=("tensor",), experts=("expert", "tensor"), expert_width=()),
    # attention that splits nothing but the batch, whole experts on all of the same devices
    "dp-ep": Layout(batch=_FREE_AXES, split=(), experts=("expert", "tensor"), expert_width=()),
    # everything split
    "tp": Layout(batch=("data",), split=("expert", "tensor"), experts=(), expert_width=("expert", "tensor")),
}
DEFAULT_LAYOUT = LAYOUTS["ep-tp"]


def parse_layout(text: str) -> Layout:
    """A Layout from its name, or from its parts as in "batch=data+expert,split=tensor,experts=expert+tensor".

    Parts left out share out nothing. Raises: LayoutError for what does not read so, and as Layout.
    """
    if text in LAYOUTS:
        return LAYOUTS[text]
    names = [one.name for one in fields(Layout)]
    parts: dict[str, Axes] = dict.fromkeys(names, ())
    for part in text.split(","):
        name, equals, axes = part.partition("=")
        if name.strip() not in names or not equals:
            raise LayoutError(
                f"layout {text!r} is none of {', '.join(LAYOUTS)}, nor parts such as batch=data+expert,split=tensor; "
                f"the parts are {', '.join(names)}"
            )
        if parts[name.strip()]:
            raise LayoutError(f"layout {text!r} names {name.strip()!r} twice: name each part once")
        parts[name.strip()] = tuple(axis.strip() for axis in axes.split("+") if axis.strip())
    return Layout(**parts)

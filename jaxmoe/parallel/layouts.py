"""Layouts: which mesh axes share out requests, the insides of layers, the context of a request, and the experts. The
pipeline axis is no layout's business: it shares out layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from jaxmoe.errors import LayoutError
from jaxmoe.parallel.mesh import AXES

Axes = tuple[str, ...]
_FREE_AXES = tuple(axis for axis in AXES if axis != "pipeline")


@dataclass(frozen=True)
class Layout:
    """Every axis but the pipeline's, by what it shares out.

    batch: requests, and their tokens. split: heads, widths of dense layers and of a shared expert, vocabulary; an
    all-reduce each. context: the keys and values of every request, and a step's tokens: ranks attend to what they hold
    and merge (context parallelism). sequence: of split, axes that share out the tokens between the split regions
    (sequence parallelism): a reduce-scatter and an all-gather in place of an all-reduce.
    experts: whole experts; along axes that share out tokens they are exchanged, along others every rank has them all.
    expert_width: each expert. Raises: LayoutError for an axis that is unknown, used twice, or of no use.
    """

    batch: Axes
    split: Axes
    experts: Axes
    expert_width: Axes
    context: Axes = ()
    sequence: Axes = ()

    def __post_init__(self) -> None:
        for one in fields(self):
            axes = getattr(self, one.name)
            for axis in axes:
                if axis not in _FREE_AXES:
                    raise LayoutError(f"layout: {one.name}={axis!r} must be one of {', '.join(_FREE_AXES)}")
        for names in (("batch", "split", "context"), ("experts", "expert_width"), ("sequence",)):
            used = [axis for name in names for axis in getattr(self, name)]
            for axis in used:
                if used.count(axis) > 1:
                    raise LayoutError(f"layout uses axis {axis!r} twice in {', '.join(names)}: an axis splits once")
        used = [*self.batch, *self.context, *self.split]
        if set(used) != set(_FREE_AXES):
            unused = next(axis for axis in _FREE_AXES if axis not in used)
            raise LayoutError(f"layout leaves axis {unused!r} without work: add it to batch, context or split")
        for axis in self.sequence:
            if axis not in self.split:
                raise LayoutError(f"layout: sequence={axis!r} must be one of split={'+'.join(self.split) or 'none'}")
        replicated = tuple(axis for axis in self.experts if axis in self.split)
        if set(replicated) | set(self.expert_width) != set(self.split):
            raise LayoutError(
                f"layout splits layers over {'+'.join(self.split) or 'no axis'}, so experts and expert_width together "
                f"must hold these of the axes that share out no tokens; they hold "
                f"{'+'.join((*replicated, *self.expert_width)) or 'none'}"
            )
        # A rank's experts, and the strips of tokens it gathers, must follow each other.
        exchange = [axis for axis in self.experts if axis not in replicated]
        strips = [axis for axis in self.experts if axis in self.sequence]
        rest = [axis for axis in replicated if axis not in self.sequence]
        if list(self.experts) != [*exchange, *strips, *rest]:
            raise LayoutError("layout: experts must name axes of batch and context first, then those of sequence")
        if set(self.sequence[: len(strips)]) != set(strips):
            raise LayoutError("layout: sequence must name axes of experts first")

    @cached_property
    def table(self) -> Mapping[str, Axes]:
        """Logical dim -> mesh axes that split it; dims of layers lie over the pipeline.

        A step's tokens are "batch" where ranks of a context have the same, "token" inside layers, "sequence_sharded"
        between them where they are shared out there, "routed" where experts are chosen for such.
        """
        whole = (
            "length", "width", "block", "head_slot", "head_dim", "gate_or_up", "router_expert", "expert_map",
            "physical_expert",
            "latent", "unsharded",
        )  # fmt: skip
        tokens = (*self.batch, *self.context)
        return dict.fromkeys(whole, ()) | {
            "layer": ("pipeline",),
            "stage": ("pipeline",),
            "batch": self.batch,
            "token": tokens,
            "sequence_sharded": (*tokens, *self.sequence),
            "routed": (*tokens, *(axis for axis in self.sequence if axis in self.experts)),
            "page": self.batch,
            "page_token": self.context,
            "vocab": self.split,
            "kv_head": self.split,
            "ffn": self.split,
            "moe_expert": self.experts,
            "moe_ffn": self.expert_width,
        }

    def used(self, mesh_axes: Mapping[str, int], *, moe: bool) -> tuple[Axes, ...]:
        """Its parts without axes of size 1, nor what no layer has: layouts of which this is equal place a model on the
        mesh alike."""
        tokens = self.batch, self.split, self.context, self.sequence
        parts = (*tokens, *((self.experts, self.expert_width) if moe else ()))
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
# the same, with tokens shared out between the split regions
LAYOUTS |= {f"{name}-sp": replace(LAYOUTS[name], sequence=LAYOUTS[name].split) for name in ("ep-tp", "tp-ep", "tp")}
# keys and values of every request over the data axis
LAYOUTS["cp-ep-tp"] = replace(LAYOUTS["ep-tp"], batch=("expert",), context=("data",))
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

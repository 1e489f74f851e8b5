"""Parallelism layouts: which mesh axes shard requests, layers, the context of requests, and experts.

The pipeline axis belongs to no layout. It shards the model by layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from jaxmoe.errors import LayoutError
from jaxmoe.parallel.mesh import AXES

Axes = tuple[str, ...]
_FREE_AXES = tuple(axis for axis in AXES if axis != "pipeline")


@dataclass(frozen=True)
class ShardingLayout:
    """Assign every mesh axis except pipeline to the dims that it shards.

    Attributes:
        batch: axes that shard requests and their tokens (data parallelism).
        split: axes that shard heads, the widths of dense layers and of a shared expert, and the vocabulary (tensor
            parallelism). Each needs an all-reduce.
        experts: axes over which whole experts are distributed (expert parallelism). Tokens are exchanged along axes
            that shard tokens. Along other axes every rank has all tokens.
        expert_width: axes that shard the width of each expert.
        context: axes that shard the keys and values of every request and the tokens of a step (context parallelism).
            Ranks attend to their own shard and merge the results.
        sequence: axes of split that also shard tokens between tensor-parallel regions (sequence parallelism). A
            reduce-scatter and an all-gather replace an all-reduce.

    Raises: LayoutError if an axis is unknown, used twice, or unused.
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
            raise LayoutError(f"layout does not use axis {unused!r}: add it to batch, context or split")
        for axis in self.sequence:
            if axis not in self.split:
                raise LayoutError(f"layout: sequence={axis!r} must be one of split={'+'.join(self.split) or 'none'}")
        replicated = tuple(axis for axis in self.experts if axis in self.split)
        if set(replicated) | set(self.expert_width) != set(self.split):
            raise LayoutError(
                f"layout: experts and expert_width must cover exactly split={'+'.join(self.split) or 'no axis'}, "
                f"not counting axes of experts that shard tokens; they cover "
                f"{'+'.join((*replicated, *self.expert_width)) or 'none'}"
            )
        # A rank's experts must be consecutive, and so must the strips of tokens that it gathers.
        exchange = [axis for axis in self.experts if axis not in replicated]
        strips = [axis for axis in self.experts if axis in self.sequence]
        rest = [axis for axis in replicated if axis not in self.sequence]
        if list(self.experts) != [*exchange, *strips, *rest]:
            raise LayoutError("layout: experts must name axes of batch and context first, then axes of sequence")
        if set(self.sequence[: len(strips)]) != set(strips):
            raise LayoutError("layout: sequence must name axes of experts first")

    @cached_property
    def table(self) -> Mapping[str, Axes]:
        """Return the mesh axes that shard each logical dim. The dims of stacked layers are sharded over pipeline.

        A step's tokens have one of four dims: "batch" where context-parallel ranks hold the same tokens, "token" inside
        layers, "sequence_sharded" between tensor-parallel regions with sequence parallelism, and "routed" where a
        router chooses experts for sequence-sharded tokens.
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
        """Return the layout's axes of size above 1, without the axes of experts if the model has no experts.

        Two layouts with equal results shard a model identically on the mesh.
        """
        tokens = self.batch, self.split, self.context, self.sequence
        parts = (*tokens, *((self.experts, self.expert_width) if moe else ()))
        return tuple(tuple(axis for axis in axes if mesh_axes.get(axis, 1) > 1) for axes in parts)

    def __str__(self) -> str:
        for name, known in LAYOUTS.items():
            if known == self:
                return name
        return ",".join(f"{one.name}={'+'.join(getattr(self, one.name))}" for one in fields(self))


LAYOUTS: dict[str, ShardingLayout] = {
    # experts over the expert axis, with tensor parallelism in layers and in each expert
    "ep-tp": ShardingLayout(batch=("data", "expert"), split=("tensor",), experts=("expert",), expert_width=("tensor",)),
    # tensor-parallel attention, whole experts over expert and tensor
    "tp-ep": ShardingLayout(batch=("data", "expert"), split=("tensor",), experts=("expert", "tensor"), expert_width=()),
    # data-parallel attention, whole experts over expert and tensor
    "dp-ep": ShardingLayout(batch=_FREE_AXES, split=(), experts=("expert", "tensor"), expert_width=()),
    # tensor parallelism everywhere
    "tp": ShardingLayout(batch=("data",), split=("expert", "tensor"), experts=(), expert_width=("expert", "tensor")),
}
# the same layouts with sequence parallelism
LAYOUTS |= {f"{name}-sp": replace(LAYOUTS[name], sequence=LAYOUTS[name].split) for name in ("ep-tp", "tp-ep", "tp")}
# context parallelism over the data axis
LAYOUTS["cp-ep-tp"] = replace(LAYOUTS["ep-tp"], batch=("expert",), context=("data",))
DEFAULT_LAYOUT = LAYOUTS["ep-tp"]


def parse_layout(layout: str | ShardingLayout) -> ShardingLayout:
    """Return the layout of this name, or parse parts such as "batch=data+expert,split=tensor,experts=expert+tensor".

    Omitted parts have no axes. A ShardingLayout is returned as it is.
    Raises: LayoutError if the text cannot be parsed, or as ShardingLayout does.
    """
    if isinstance(layout, ShardingLayout):
        return layout
    if not isinstance(layout, str):
        raise LayoutError(f"layout={layout!r:.60} must be one of {', '.join(LAYOUTS)}, its parts, or a ShardingLayout")
    text = layout
    if text in LAYOUTS:
        return LAYOUTS[text]
    names = [one.name for one in fields(ShardingLayout)]
    parts: dict[str, Axes] = dict.fromkeys(names, ())
    for part in text.split(","):
        name, equals, axes = part.partition("=")
        if name.strip() not in names or not equals:
            raise LayoutError(
                f"layout {text!r} must be one of {', '.join(LAYOUTS)}, or parts such as batch=data+expert,split=tensor"
                f"; the parts are {', '.join(names)}"
            )
        if parts[name.strip()]:
            raise LayoutError(f"layout {text!r} names {name.strip()!r} twice: name each part once")
        parts[name.strip()] = tuple(axis.strip() for axis in axes.split("+") if axis.strip())
    return ShardingLayout(**parts)

"""Where things lie: the resolver of a layout's table from logical dims to mesh axes. Nothing else places arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, Layout
from jaxmoe.parallel.mesh import PlannedMesh, conform_mesh
from jaxmoe.parallel.stages import LayerSegment

Dims = tuple[str, ...]

# How an array stands to the pipeline: "stacked" ones hold layers that stages share out; "in_stage" is how a stage sees
# them; "outside_pipeline" are all others (embedding, head, layers that no stage holds), split over pipeline as over
# tensor.
PipelineView = Literal["stacked", "in_stage", "outside_pipeline"]

# Of tokens shared out between split regions a rank has so many at a time. XLA:TPU reduces and scatters whole tiles of
# rows; of smaller strips it makes an all-reduce, with twice the bytes, and larger ones it pads.
_STRIP_ROWS = {"tpu": 8}

# How a step's tokens lie: inside layers, or between their split regions.
TokenDim = Literal["token", "sequence_sharded"]

# Dims inside a layer, which beside the stages lie over the pipeline too.
_LAYER_DIMS = ("vocab", "kv_head", "ffn", "moe_ffn")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A mesh and a layout: answers where an array with given logical dims lies, as seen from where it is asked.

    mesh: any Mesh over some of the four axes, in any order (mesh.conform_mesh gives the one kept here); a PlannedMesh
    does as well for all but running. virtual_stages: runs of layers that a stage of the pipeline holds, interleaved
    with those of the others.
    redundant_experts: places for experts beyond their number; None where experts stand in order, once each, and the
    program knows it; where given, it is told where they stand (parallel/eplb.py).
    """

    mesh: Mesh
    layout: Layout = DEFAULT_LAYOUT
    virtual_stages: int = 1
    view: PipelineView = "stacked"
    redundant_experts: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mesh, Mesh):
            object.__setattr__(self, "mesh", conform_mesh(self.mesh))

    def with_view(self, view: PipelineView) -> Placement:
        """The same, for arrays that stand otherwise to the pipeline."""
        if view == self.view:
            return self
        if view not in self._views:
            self._views[view] = replace(self, view=view)
        return self._views[view]

    def for_layers(self, segment: LayerSegment) -> Placement:
        """The same, as the layers of a segment see it."""
        return self.with_view("in_stage" if segment.stages > 1 else "outside_pipeline")

    def for_params(self, segment: LayerSegment) -> Placement:
        """The same, as the arrays that hold all layers of a segment lie."""
        return self.with_view("stacked" if segment.stages > 1 else "outside_pipeline")

    @property
    def platform(self) -> str:
        """Of the mesh's devices: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.mesh.shape["pipeline"]

    def axes(self, dim: str) -> tuple[str, ...]:
        """The mesh axes that split a logical dim. Raises: KeyError for a dim the table does not know."""
        axes = self.layout.table[dim]
        if dim == "layer" and self.view != "stacked":
            return ()
        if dim in _LAYER_DIMS and self.view == "outside_pipeline" and self.num_stages > 1:
            return ("pipeline", *axes)
        return axes

    def token_dim(self, num_rows: int) -> TokenDim:
        """How so many rows of tokens lie between the split regions of layers: shared out there where that comes out
        even, in whole strips."""
        sequence_sharded = self.layout.sequence and num_rows % (self.num_shards("batch") * self.strip_tokens) == 0
        return "sequence_sharded" if sequence_sharded else "token"

    @property
    def strip_rows(self) -> int:
        """Rows of tokens that a platform scatters together."""
        return _STRIP_ROWS.get(self.platform, 1)

    @property
    def strip_tokens(self) -> int:
        """What a rank's tokens must be a multiple of to be shared out between the split regions of layers."""
        return self.strip_rows * self.num_shards("sequence_sharded") // self.num_shards("batch")

    def ep_exchange_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes along which ranks have other tokens and other experts."""
        return tuple(axis for axis in self.axes("moe_expert") if axis in self.axes(token_dim))

    @property
    def dispatch_levels(self) -> tuple[str, ...]:
        """Of the axes along which tokens may go to their experts, those of several ranks, outermost first."""
        return tuple(axis for axis in self.ep_exchange_axes("sequence_sharded") if self.mesh.shape[axis] > 1)

    def ragged_peers(self, dispatch: str) -> int:
        """Ranks among which a dispatch exchanges rows of uneven numbers; 1 where it does not."""
        skipped = {"ragged_all_to_all": 0, "hierarchical_ragged": 1}.get(dispatch)
        return 1 if skipped is None else self.size(self.dispatch_levels[skipped:])

    def ep_replicated_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes along which ranks have the same tokens and other experts."""
        return tuple(axis for axis in self.axes("moe_expert") if axis not in self.axes(token_dim))

    def routed(self, token_dim: TokenDim) -> str:
        """How tokens lie where experts are chosen for them."""
        return "routed" if token_dim == "sequence_sharded" else "token"

    def ep_gather_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes that share out tokens between the split regions, along which experts are split and need them all."""
        return tuple(axis for axis in self.sequence_gather_axes(token_dim) if axis not in self.axes("moe_expert"))

    def expert_reduce_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes along which ranks have parts of what experts make of the same tokens."""
        axes = (*self.ep_replicated_axes(token_dim), *self.axes("moe_ffn"))
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def sequence_gather_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes that share out tokens between the split regions, along which those need them all."""
        axes = self.layout.sequence if token_dim == "sequence_sharded" else ()
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def token_shard_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Axes along which ranks have other tokens of the same requests between the split regions."""
        return tuple(axis for axis in self.axes(token_dim) if axis not in self.axes("batch"))

    def size(self, axes: Iterable[str]) -> int:
        """Devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def _jax_mesh(self) -> Mesh | AbstractMesh:
        """The mesh as JAX knows it."""
        return self.mesh.abstract_mesh if isinstance(self.mesh, PlannedMesh) else self.mesh

    def _mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh as code being traced sees it: within a stage, one whose pipeline is not XLA's to split."""
        here = jax.sharding.get_abstract_mesh()
        return here if self.view == "in_stage" and not here.empty else self._jax_mesh

    def num_shards(self, dim: str) -> int:
        """How many parts a logical dim is split in."""
        if dim not in self._num_shards:
            self._num_shards[dim] = self.size(self.axes(dim))
        return self._num_shards[dim]

    # What was asked before: a search asks the same of every placement many times.

    @cached_property
    def _num_shards(self) -> dict[str, int]:
        return {}

    @cached_property
    def _views(self) -> dict[PipelineView, Placement]:
        return {}

    def spec(self, *dims: str) -> P:
        """The PartitionSpec of an array whose dims are these."""
        return P(*(self.axes(dim) or None for dim in dims))

    def sharding(self, *dims: str) -> NamedSharding:
        """The NamedSharding of an array whose dims are these."""
        return NamedSharding(self._jax_mesh, self.spec(*dims))

    def constrain(self, x: jax.Array, *dims: str) -> jax.Array:
        """x, asked of XLA to lie as its dims say."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh_here(), self.spec(*dims)))

    def shard_map_local(
        self, function: Callable[..., Any], *arrays: tuple[jax.Array, Dims], out: Dims | tuple[Dims, ...]
    ) -> Any:
        """function of each device's parts, for work that XLA is not to split or cannot see into."""
        return self.shard_map(
            function,
            in_specs=tuple(self.spec(*dims) for _, dims in arrays),
            out_specs=self.spec(*out) if isinstance(out[0], str) else tuple(self.spec(*dims) for dims in out),
        )(*(array for array, _ in arrays))

    def shard_map(self, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """function as a shard_map over all axes, or within a stage over all but the pipeline."""
        mesh = self._mesh_here()
        axes = set(mesh.axis_names) - ({"pipeline"} if mesh is not self._jax_mesh else set())
        return jax.shard_map(
            function, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache(maxsize=4096)
def _head_slots(num_kv_heads: int, num_groups: int, num_shards: int) -> tuple[int, int, int]:
    """(kv_slots, kv_copies, group_slots) for num_shards devices: the fewest columns of q, k and v in all."""

    def plan(copies: int) -> tuple[int, int, int]:
        return _round_up(num_kv_heads * copies, num_shards), copies, -(-num_groups // copies)

    return min((plan(copies) for copies in range(1, num_shards + 1)), key=lambda p: (p[0] * (p[2] + 2), p[1]))


def _whole_blocks(config: ModelConfig) -> int:
    """What a device's share of an expert's width must be a multiple of: a block of packed numbers where there are
    such."""
    kept = config.quantization
    return kept.format.inputs or 1 if kept is not None and kept.format.packing_factor > 1 else 1


def segment_sizes(config: ModelConfig, placement: Placement, segments: Iterable[LayerSegment]) -> list[ArraySizes]:
    """array_sizes of the layers of each segment."""
    return [array_sizes(config, placement.for_layers(segment)) for segment in segments]


def array_sizes(config: ModelConfig, placement: Placement) -> ArraySizes:
    """The config's sizes, padded or replicated so that every split of the layout comes out even.

    Those of layers, for layers that stand to the pipeline as the placement's view says.
    """
    kv_slots, kv_copies, group_slots = _head_slots(
        config.num_key_value_heads, config.num_query_groups, placement.num_shards("kv_head")
    )
    moe = config.moe
    return ArraySizes(
        vocab=_round_up(config.vocab_size, placement.with_view("outside_pipeline").num_shards("vocab")),
        kv_slots=kv_slots,
        kv_copies=kv_copies,
        group_slots=group_slots,
        ffn=_round_up(config.intermediate_size, placement.num_shards("ffn")),
        moe_experts=_round_up(moe.num_experts + (placement.redundant_experts or 0), placement.num_shards("moe_expert"))
        if moe
        else 0,
        moe_ffn=_round_up(moe.intermediate_size, placement.num_shards("moe_ffn") * _whole_blocks(config)) if moe else 0,
        shared_ffn=_round_up(moe.shared_intermediate_size, placement.num_shards("ffn")) if moe else 0,
    )

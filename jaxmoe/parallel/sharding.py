"""Sharding rules: map logical dims to mesh axes by a layout's table. No other module decides shardings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, ShardingLayout
from jaxmoe.parallel.mesh import PlannedMesh, conform_mesh
from jaxmoe.parallel.stages import LayerSegment

Dims = tuple[str, ...]

# Relation of an array to the pipeline: "stacked" arrays hold layers sharded over the stages; "in_stage" is one stage's
# view of them; "outside_pipeline" are all other arrays (embedding, LM head, layers outside the stages), which pipeline
# shards as tensor does.
PipelineView = Literal["stacked", "in_stage", "outside_pipeline"]

# Rows of sequence-sharded tokens that form a strip. XLA:TPU reduce-scatters whole tiles of rows. It turns smaller
# strips into an all-reduce, with twice the bytes, and pads larger ones.
_STRIP_ROWS = {"tpu": 8}

# Logical dim of a step's token rows: inside layers, or between tensor-parallel regions.
TokenDim = Literal["token", "sequence_sharded"]

# Dims inside a layer; pipeline shards them, too, in layers outside the stages.
_LAYER_DIMS = ("vocab", "kv_head", "ffn", "moe_ffn")


@dataclass(frozen=True, kw_only=True)
class MeshPlacement:
    """Resolve logical dims to mesh axes for a mesh and a layout, as seen from a position in the pipeline.

    Attributes:
        mesh: any Mesh over some of the four axes in any order (stored as mesh.conform_mesh returns it). A PlannedMesh
            works for everything except running.
        layout: which mesh axes shard which dims.
        virtual_stages: number of runs of layers that a pipeline stage holds, interleaved with the runs of other stages.
        view: relation of the arrays to the pipeline.
        redundant_experts: number of physical experts beyond the logical ones. The program then receives the expert map
            as an input (parallel/eplb.py). With None, the program assumes one replica of each expert, in order.
    """

    mesh: Mesh
    layout: ShardingLayout = DEFAULT_LAYOUT
    virtual_stages: int = 1
    view: PipelineView = "stacked"
    redundant_experts: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mesh, Mesh):
            object.__setattr__(self, "mesh", conform_mesh(self.mesh))

    def with_view(self, view: PipelineView) -> MeshPlacement:
        """Return this placement for arrays with another relation to the pipeline."""
        if view == self.view:
            return self
        if view not in self._views:
            self._views[view] = replace(self, view=view)
        return self._views[view]

    def for_layers(self, segment: LayerSegment) -> MeshPlacement:
        """Return this placement as seen inside the layers of a segment."""
        return self.with_view("in_stage" if segment.stages > 1 else "outside_pipeline")

    def for_params(self, segment: LayerSegment) -> MeshPlacement:
        """Return this placement for the stacked parameters of a segment."""
        return self.with_view("stacked" if segment.stages > 1 else "outside_pipeline")

    @property
    def platform(self) -> str:
        """Return the platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def num_stages(self) -> int:
        """Return the number of pipeline stages."""
        return self.mesh.shape["pipeline"]

    def axes(self, dim: str) -> tuple[str, ...]:
        """Return the mesh axes that shard a logical dim. Raises: KeyError if the table lacks the dim."""
        axes = self.layout.table[dim]
        if dim == "layer" and self.view != "stacked":
            return ()
        if dim in _LAYER_DIMS and self.view == "outside_pipeline" and self.num_stages > 1:
            return ("pipeline", *axes)
        return axes

    def token_dim(self, num_rows: int) -> TokenDim:
        """Return the logical dim of num_rows token rows between tensor-parallel regions.

        Rows are sequence-sharded if the layout has sequence parallelism and they divide evenly into whole strips.
        """
        sequence_sharded = self.layout.sequence and num_rows % (self.num_shards("batch") * self.strip_tokens) == 0
        return "sequence_sharded" if sequence_sharded else "token"

    @property
    def strip_rows(self) -> int:
        """Return how many token rows the platform reduce-scatters as a unit."""
        return _STRIP_ROWS.get(self.platform, 1)

    @property
    def strip_tokens(self) -> int:
        """Return the alignment of a rank's tokens for sequence sharding: whole strips for every shard."""
        return self.strip_rows * self.num_shards("sequence_sharded") // self.num_shards("batch")

    def ep_exchange_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes along which ranks have different tokens and different experts."""
        return tuple(axis for axis in self.axes("moe_expert") if axis in self.axes(token_dim))

    @property
    def dispatch_levels(self) -> tuple[str, ...]:
        """Return the axes of more than one rank along which tokens may be exchanged, outermost first."""
        return tuple(axis for axis in self.ep_exchange_axes("sequence_sharded") if self.mesh.shape[axis] > 1)

    def ragged_peers(self, dispatch: str) -> int:
        """Return the number of ranks among which a dispatch backend exchanges uneven numbers of rows.

        It is 1 for backends without ragged collectives.
        """
        skipped = {"ragged_all_to_all": 0, "hierarchical_ragged": 1}.get(dispatch)
        return 1 if skipped is None else self.size(self.dispatch_levels[skipped:])

    def ep_replicated_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes along which ranks have the same tokens and different experts."""
        return tuple(axis for axis in self.axes("moe_expert") if axis not in self.axes(token_dim))

    def routed(self, token_dim: TokenDim) -> str:
        """Return the logical dim of token rows where the router chooses experts."""
        return "routed" if token_dim == "sequence_sharded" else "token"

    def ep_gather_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes over which experts need sequence-sharded tokens all-gathered."""
        return tuple(axis for axis in self.sequence_gather_axes(token_dim) if axis not in self.axes("moe_expert"))

    def expert_reduce_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes over which expert outputs are reduced."""
        axes = (*self.ep_replicated_axes(token_dim), *self.axes("moe_ffn"))
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def sequence_gather_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes over which sequence-sharded tokens are all-gathered before tensor-parallel regions."""
        axes = self.layout.sequence if token_dim == "sequence_sharded" else ()
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def token_shard_axes(self, token_dim: TokenDim) -> tuple[str, ...]:
        """Return the mesh axes that shard the tokens of the same requests."""
        return tuple(axis for axis in self.axes(token_dim) if axis not in self.axes("batch"))

    def size(self, axes: Iterable[str]) -> int:
        """Return the number of devices along the given axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def _jax_mesh(self) -> Mesh | AbstractMesh:
        return self.mesh.abstract_mesh if isinstance(self.mesh, PlannedMesh) else self.mesh

    def _mesh_here(self) -> Mesh | AbstractMesh:
        """Return the mesh that traced code sees: within a stage, one whose pipeline axis is manual."""
        here = jax.sharding.get_abstract_mesh()
        return here if self.view == "in_stage" and not here.empty else self._jax_mesh

    def num_shards(self, dim: str) -> int:
        """Return the number of shards of a logical dim."""
        if dim not in self._num_shards:
            self._num_shards[dim] = self.size(self.axes(dim))
        return self._num_shards[dim]

    # Caches: a planner search repeats the same queries on every placement many times.

    @cached_property
    def _num_shards(self) -> dict[str, int]:
        return {}

    @cached_property
    def _views(self) -> dict[PipelineView, MeshPlacement]:
        return {}

    def spec(self, *dims: str) -> P:
        """Return the PartitionSpec of an array with these logical dims."""
        return P(*(self.axes(dim) or None for dim in dims))

    def sharding(self, *dims: str) -> NamedSharding:
        """Return the NamedSharding of an array with these logical dims."""
        return NamedSharding(self._jax_mesh, self.spec(*dims))

    @cached_property
    def spans_processes(self) -> bool:
        """Return whether the mesh has devices of several processes, so that no process sees all of an array."""
        return len({getattr(device, "process_index", 0) for device in self.mesh.devices.flat}) > 1

    def put(self, values: np.ndarray, *dims: str) -> jax.Array:
        """Put a host array on the mesh, sharded by its logical dims. All processes must hold the same values."""
        return put_on(values, self.sharding(*dims))

    def constrain(self, x: jax.Array, *dims: str) -> jax.Array:
        """Return x with a sharding constraint for its logical dims."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh_here(), self.spec(*dims)))

    def shard_map_local(
        self, function: Callable[..., Any], *arrays: tuple[jax.Array, Dims], out: Dims | tuple[Dims, ...]
    ) -> Any:
        """Run function on every device's shards, for work that XLA must not shard or cannot see into.

        arrays: pairs of an array and its logical dims. out: logical dims of the result, or of each result.
        """
        return self.shard_map(
            function,
            in_specs=tuple(self.spec(*dims) for _, dims in arrays),
            out_specs=self.spec(*out) if isinstance(out[0], str) else tuple(self.spec(*dims) for dims in out),
        )(*(array for array, _ in arrays))

    def shard_map(self, function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Return function as a shard_map over all axes, or within a stage over all axes except pipeline."""
        mesh = self._mesh_here()
        axes = set(mesh.axis_names) - ({"pipeline"} if mesh is not self._jax_mesh else set())
        return jax.shard_map(
            function, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def put_on(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put a host array on devices, of which those of other processes are filled by them from the same values.

    jax.device_put would compare the values between the processes at every call.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache(maxsize=4096)
def _head_slots(num_kv_heads: int, num_groups: int, num_shards: int) -> tuple[int, int, int]:
    """Return (kv_slots, kv_copies, group_slots) for num_shards shards with the fewest total columns of q, k and v."""

    def plan(copies: int) -> tuple[int, int, int]:
        return _round_up(num_kv_heads * copies, num_shards), copies, -(-num_groups // copies)

    return min((plan(copies) for copies in range(1, num_shards + 1)), key=lambda p: (p[0] * (p[2] + 2), p[1]))


def _whole_blocks(config: ModelConfig) -> int:
    """Return the alignment of a device's share of an expert's width.

    For packed number formats it is the block size along the inputs, otherwise 1.
    """
    kept = config.quantization
    return kept.format.inputs or 1 if kept is not None and kept.format.packing_factor > 1 else 1


def segment_sizes(config: ModelConfig, placement: MeshPlacement, segments: Iterable[LayerSegment]) -> list[ArraySizes]:
    """Return array_sizes for the layers of each segment."""
    return [array_sizes(config, placement.for_layers(segment)) for segment in segments]


def array_sizes(config: ModelConfig, placement: MeshPlacement) -> ArraySizes:
    """Return the config's sizes, padded or replicated so that every shard is even.

    Sizes of layers depend on the placement's pipeline view.
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

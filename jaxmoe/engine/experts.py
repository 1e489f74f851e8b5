"""Expert placement of a running model: token counts per expert, and moves between physical experts."""

# Dims: E logical experts, R physical experts (of all ranks), n ranks that route.
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.errors import ConfigError
from jaxmoe.model.transformer import TokensPerExpert
from jaxmoe.parallel.eplb import ExpertPlacement, sources_of
from jaxmoe.parallel.sharding import Dims, MeshPlacement, put_on
from jaxmoe.parallel.stages import LayerLocation, LayerSegment, locate_layer
from jaxmoe.weights.params import ParamInfo


class ExpertLoads(NamedTuple):
    """Hold the tokens routed to each physical expert, logical expert and rank of each MoE layer.

    Attributes:
        by_physical_expert: Token counts [layers,R].
        by_expert: Token counts [layers,E].
        by_rank: Token counts [layers,ranks].
    """

    by_physical_expert: np.ndarray
    by_expert: np.ndarray
    by_rank: np.ndarray


class ExpertManager:
    """Count tokens per expert and move experts between the physical experts of every MoE layer.

    num_physical_experts: physical experts of a layer, equally many on each of num_ranks ranks. placement: the current
    placement; None while the experts are in their original order. Without MeshPlacement.redundant_experts the program
    has no map of physical experts, and the order never changes.
    """

    def __init__(
        self, config: ModelConfig, model_placement: MeshPlacement,
        segments: Sequence[LayerSegment], sizes: Sequence[ArraySizes],
        table: Sequence[ParamInfo],
    ) -> None:  # fmt: skip
        self._model_placement, self._segments, self._table = model_placement, segments, table
        layers = (layer for layer, sparse in enumerate(config.moe_layers) if sparse)
        self._layers: list[LayerLocation] = [locate_layer(layer, tuple(segments)) for layer in layers]
        self.num_experts = config.moe.num_experts if config.moe else 0
        self.num_physical_experts, self.num_ranks = sizes[0].moe_experts, model_placement.num_shards("moe_expert")
        self.placement: ExpertPlacement | None = None
        # CPU devices may share the memory of a loaded checkpoint, which must not be overwritten.
        donated = () if model_placement.platform == "cpu" else (0,)
        self._move_fn = jax.jit(self._move, donate_argnums=donated, static_argnames=("segment", "dims"))
        self._moves: dict[int, Any] = {}  # compiled programs by parameter index

    @property
    def num_layers(self) -> int:
        """Return the number of MoE layers."""
        return len(self._layers)

    # --- expert loads ---

    def physical_loads(self, tokens_per_expert: TokensPerExpert) -> np.ndarray:
        """Return the tokens routed to each physical expert in a traced step: [layers,R]."""
        counts: Any = tokens_per_expert
        by_layer = [np.asarray(counts[at.segment][at.block])[at.slot].sum(axis=0) for at in self._layers]
        return np.stack(by_layer) if by_layer else np.zeros((0, self.num_physical_experts), np.int32)

    def rank_loads(self, physical_loads: np.ndarray) -> np.ndarray:
        """Sum physical_loads [layers,R] over each rank's physical experts: [layers,ranks]."""
        share = self.num_physical_experts // self.num_ranks
        return physical_loads.reshape(len(physical_loads), self.num_ranks, share).sum(axis=2)

    def expert_loads(self, physical_loads: np.ndarray) -> ExpertLoads:
        """Sum physical_loads [layers,R], taken under the current placement, by logical expert and by rank."""
        loads = np.zeros((len(physical_loads), self.num_experts), np.int64)
        if self.placement is None:
            loads += physical_loads[:, : self.num_experts]
        else:
            for layer, physical_to_logical_map in enumerate(self.placement.physical_to_logical_map):
                np.add.at(loads[layer], physical_to_logical_map, physical_loads[layer])
        return ExpertLoads(physical_loads, loads, self.rank_loads(physical_loads))

    # --- moving experts ---

    def move(self, leaves: list[jax.Array], wanted: ExpertPlacement) -> None:
        """Move the experts and their replicas to the wanted placement, by replacing parameters in `leaves` in place.

        leaves: parameters in the order of the parameter table. On accelerators the old arrays are donated. Raises:
        ConfigError if the placement has other numbers of layers, physical experts or ranks than the model, an expert
        or replica is missing or repeated, or the model was loaded without redundant_experts.
        """
        self._check(wanted)
        sources: dict[tuple[int, ...], np.ndarray] = {}
        expert_maps: dict[tuple[int, ...], np.ndarray] = {}
        as_loaded = np.arange(self.num_physical_experts, dtype=np.int32)  # empty beyond the logical experts
        for layer, at in enumerate(self._layers):
            slots, block = self._segments[at.segment].slots, (at.segment, at.block)
            source = sources.setdefault(block, np.tile(as_loaded, (slots, 1)))
            indices = expert_maps.setdefault(block, np.zeros((slots, 3, self.num_physical_experts), np.int32))
            old = as_loaded if self.placement is None else self.placement.physical_to_logical_map[layer]
            new = wanted.physical_to_logical_map[layer]
            source[at.slot] = sources_of(old, new, self.num_physical_experts // self.num_ranks)
            indices[at.slot] = new, wanted.replica_index[layer], wanted.logical_replica_count[layer][new]
        moves: list[tuple[int, Callable[..., Any], np.ndarray]] = []
        for index, info in enumerate(self._table):
            at_block = tuple(int(name) for name in info.path.split("/")[1:3] if name.isdigit())
            if "moe_expert" in info.dims:
                if index not in self._moves:
                    how: Any = dict(segment=self._segments[at_block[0]], dims=info.dims)
                    self._moves[index] = self._move_fn.lower(leaves[index], sources[at_block], **how).compile()
                moves.append((index, self._moves[index], sources[at_block]))
            elif "expert_map" in info.dims:
                moves.append((index, partial(_put, info=info), expert_maps[at_block]))
        for index, run, indices in moves:  # compiled above, so that errors come before any change
            leaves[index] = run(leaves[index], indices)
        self.placement = wanted

    def _check(self, wanted: ExpertPlacement) -> None:
        if self._model_placement.redundant_experts is None:
            raise ConfigError(
                "experts cannot be moved in this program: load the model with redundant_experts=0 or more"
            )
        own = self.num_layers, self.num_physical_experts
        if wanted.physical_to_logical_map.shape != own or wanted.num_ranks != self.num_ranks:
            raise ConfigError(
                f"the placement has {wanted.physical_to_logical_map.shape[0]} layers, "
                f"{wanted.physical_to_logical_map.shape[1]} physical experts and {wanted.num_ranks} ranks, "
                f"the model has {own[0]}, {own[1]} and {self.num_ranks}"
            )
        for layer in range(self.num_layers):
            at, nth, count = (
                wanted.physical_to_logical_map[layer],
                wanted.replica_index[layer],
                wanted.logical_replica_count[layer].tolist(),
            )
            every = [(expert, which) for expert, replicas in enumerate(count) for which in range(replicas)]
            right = len(count) == self.num_experts and min(count) >= 1 and len(every) == self.num_physical_experts
            right = right and sorted(zip(at.tolist(), nth.tolist(), strict=True)) == every
            if not right:
                raise ConfigError(
                    f"the placement must have each of {self.num_experts} experts at least once in every layer, with "
                    f"replicas numbered from 0; in MoE layer {layer} it does not"
                )

    def _move(self, weights: jax.Array, source: jax.Array, *, segment: LayerSegment, dims: Dims) -> jax.Array:
        """Move experts: physical expert p of each slot of weights [slots,R,...] receives the one at source[slot, p].

        Slots are processed one by one. The experts of a slot pass once around the ring of ranks, and each rank copies
        the ones that it needs.
        """
        model_placement = self._model_placement.for_params(segment)
        axes, ranks, shape = model_placement.axes("moe_expert"), self.num_ranks, model_placement.mesh.shape
        ordered = tuple(axis for axis in shape if axis in axes)  # ppermute requires axes in mesh order
        along = np.arange(ranks).reshape([shape[axis] for axis in ordered])
        order = along.transpose([ordered.index(axis) for axis in axes]).reshape(-1).tolist()
        ring = list(zip(order, order[1:] + order[:1], strict=True))

        def on_device(weights: jax.Array, source: jax.Array) -> jax.Array:
            share = weights.shape[1]
            me = jax.lax.axis_index(axes) if axes else 0

            def slot(at: Any, weights: jax.Array) -> jax.Array:
                own = jax.lax.dynamic_slice_in_dim(source[at], me * share, share)

                def ring_step(step: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    passing, taken = carry
                    here = own - (me - step) % ranks * share
                    there = (here >= 0) & (here < share)
                    some = passing[jnp.clip(here, 0, share - 1)]
                    taken = jnp.where(there.reshape(-1, *(1,) * (some.ndim - 1)), some, taken)
                    return jax.lax.ppermute(passing, ordered, ring) if ranks > 1 else passing, taken

                _, taken = jax.lax.fori_loop(0, ranks, ring_step, (weights[at], weights[at]))
                return weights.at[at].set(taken)

            return jax.lax.fori_loop(0, len(weights), slot, weights)

        return model_placement.shard_map_local(on_device, (weights, dims), (source, ("layer", "unsharded")), out=dims)


def _put(_: jax.Array, values: np.ndarray, *, info: ParamInfo) -> jax.Array:
    """Put values on the devices with the sharding of the parameter."""
    return put_on(values, info.sharding)

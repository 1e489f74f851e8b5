"""Where things lie: one table from logical dims to mesh axes, and one resolver. Nothing else names axes for arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.config import ArraySizes, ModelConfig

Dims = tuple[str, ...]
Table = Mapping[str, tuple[str, ...]]

# Logical dim -> mesh axes that split it. Outside the experts the expert axis carries batch.
LAYOUTS: dict[str, Table] = {
    "tp+ep": {
        "layer": (),
        "batch": ("data", "expert"),
        "length": (),
        "vocab": ("tensor",),
        "width": (),
        "block": (),
        "page": ("data", "expert"),
        "page_token": (),
        "kv_head": ("tensor",),
        "head_slot": (),
        "head_dim": (),
        "gate_or_up": (),
        "ffn": ("tensor",),
        "moe_expert": ("expert",),
        "moe_ffn": ("tensor",),
        "router_expert": (),
        "one": (),
    },
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A mesh and a layout: answers where an array with given logical dims lies."""

    mesh: Mesh
    layout: str = "tp+ep"

    def axes(self, dim: str) -> tuple[str, ...]:
        """The mesh axes that split a logical dim. Raises: KeyError for a dim the table does not know."""
        return LAYOUTS[self.layout][dim]

    def parts(self, dim: str) -> int:
        """How many parts a logical dim is split in."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(dim))

    def spec(self, *dims: str) -> P:
        """The PartitionSpec of an array whose dims are these."""
        return P(*(self.axes(dim) or None for dim in dims))

    def sharding(self, *dims: str) -> NamedSharding:
        """The NamedSharding of an array whose dims are these."""
        return NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, x: jax.Array, *dims: str) -> jax.Array:
        """x, asked of XLA to lie as its dims say."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*dims))

    def locally(
        self, function: Callable[..., Any], *arrays: tuple[jax.Array, Dims], out: Dims | tuple[Dims, ...]
    ) -> Any:
        """function of each device's parts, for work that XLA is not to split or cannot see into."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self.spec(*dims) for _, dims in arrays),
            out_specs=self.spec(*out) if isinstance(out[0], str) else tuple(self.spec(*dims) for dims in out),
            check_vma=False,
        )(*(array for array, _ in arrays))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _head_slots(num_kv_heads: int, num_groups: int, parts: int) -> tuple[int, int, int]:
    """(kv_slots, kv_copies, group_slots) for parts devices: the fewest columns of q, k and v in all."""

    def plan(copies: int) -> tuple[int, int, int]:
        return _round_up(num_kv_heads * copies, parts), copies, -(-num_groups // copies)

    return min((plan(copies) for copies in range(1, parts + 1)), key=lambda p: (p[0] * (p[2] + 2), p[1]))


def array_sizes(config: ModelConfig, placement: Placement) -> ArraySizes:
    """The config's sizes, padded or replicated so that every split of the layout comes out even."""
    kv_slots, kv_copies, group_slots = _head_slots(
        config.num_key_value_heads, config.num_query_groups, placement.parts("kv_head")
    )
    moe = config.moe
    return ArraySizes(
        vocab=_round_up(config.vocab_size, placement.parts("vocab")),
        kv_slots=kv_slots,
        kv_copies=kv_copies,
        group_slots=group_slots,
        ffn=_round_up(config.intermediate_size, placement.parts("ffn")),
        moe_experts=_round_up(moe.num_experts, placement.parts("moe_expert")) if moe else 0,
        moe_ffn=_round_up(moe.intermediate_size, placement.parts("moe_ffn")) if moe else 0,
        shared_ffn=_round_up(moe.shared_intermediate_size, placement.parts("moe_ffn")) if moe else 0,
    )

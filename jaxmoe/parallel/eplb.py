"""Place experts and redundant replicas on ranks: expert-parallel load balancing (EPLB).

The input is loads [layers, experts], the result a placement of replicas on ranks. The placement is hierarchical if the
number of expert groups is a multiple of the nodes: each group stays inside one node, so that group-limited routing
keeps a token there. It is global otherwise.

- distinct: no rank has two replicas of one expert, unless a rank has more slots than there are experts; see
  parallel/eplb_spread.py.
- eplb: the published algorithm, which may put several replicas of an expert on one rank, without any benefit.
Source of eplb: DeepSeek-AI, Expert Parallelism Load Balancer (2025); the code reproduces its published example.
"""

# Dims: X independent rows (layers, or layers x nodes), N items of a row, E experts, R replicas in all.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Literal

import numpy as np

from jaxmoe.errors import ConfigError
from jaxmoe.parallel.eplb_spread import MAX_TRIES, gain_of, rank_loads, spread

Algorithm = Literal["distinct", "eplb"]
_MAX_EXCHANGES = 64  # swaps of groups between nodes, per layer
_FEWER_TRIES = 8  # perturbed placements per swap
ALGORITHMS: tuple[Algorithm, ...] = ("distinct", "eplb")


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Map the physical experts of each layer to logical experts. Each rank has an equal run of physical experts.

    physical_to_logical_map [layers, R]: the logical expert of each physical expert. replica_index [layers, R]: index of
    the physical expert among the replicas of its logical expert. logical_replica_count [layers, E]: number of replicas
    of each logical expert.
    """

    physical_to_logical_map: np.ndarray
    replica_index: np.ndarray
    logical_replica_count: np.ndarray
    num_ranks: int

    def maps(self) -> list[np.ndarray]:
        """Return the three maps in order."""
        return [self.physical_to_logical_map, self.replica_index, self.logical_replica_count]

    @classmethod
    def of(cls, maps: Sequence[np.ndarray], *, num_ranks: int) -> ExpertPlacement:
        """Return the placement with the three maps in order."""
        names = ("physical_to_logical_map", "replica_index", "logical_replica_count")
        return cls(**dict(zip(names, maps, strict=True)), num_ranks=num_ranks)

    def rank_loads(self, loads: np.ndarray) -> np.ndarray:
        """Return the tokens of each rank [layers, ranks]; replicas share the loads [layers, E] evenly."""
        share = np.take_along_axis(
            np.asarray(loads, np.float64) / self.logical_replica_count, self.physical_to_logical_map, axis=1
        )
        return share.reshape(len(share), self.num_ranks, -1).sum(axis=-1)


def balancedness(rank_loads: np.ndarray) -> float:
    """Return the mean over the maximum load of a rank, each summed over layers; 1 is perfectly balanced.

    rank_loads: [layers, ranks]. Layers without tokens do not count; without any tokens the result is 1.
    """
    fullest = rank_loads.max(axis=1).sum()
    return float(rank_loads.mean(axis=1).sum() / fullest) if fullest > 0 else 1.0


def balance(
    loads: np.ndarray, *, num_replicas: int, num_groups: int = 1, num_nodes: int = 1, num_ranks: int,
    algorithm: Algorithm = "distinct",
) -> ExpertPlacement:  # fmt: skip
    """Place num_replicas replicas on num_ranks ranks so that the loads [layers, experts] are balanced.

    Raises: ConfigError naming the values, for an unknown algorithm, counts that do not divide, too few replicas, or
    loads that are negative or not finite.
    """
    check_algorithm(algorithm)
    loads = np.asarray(loads, np.float64)
    num_experts = loads.shape[1]
    for what, value, by, parts in (
        ("replicas", num_replicas, "ranks", num_ranks),
        ("ranks", num_ranks, "nodes", num_nodes),
        ("experts", num_experts, "groups", num_groups),
    ):
        if parts < 1 or value % parts:
            raise ConfigError(f"{value} {what} do not divide among {parts} {by}: choose a multiple")
    if num_replicas < num_experts:
        raise ConfigError(f"{num_replicas} replicas for {num_experts} experts: each needs at least one")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ConfigError("loads must be finite and at least 0")
    if num_groups % num_nodes:  # groups do not fit nodes: place globally
        num_groups = num_nodes = 1

    in_node, node_experts = _groups_to_nodes(loads, num_groups, num_nodes)
    sizes = num_replicas // num_nodes, num_ranks // num_nodes
    local, replica, counts = _eplb(in_node, *sizes)
    if algorithm == "distinct":
        for layer, row in enumerate(range(0, len(node_experts), num_nodes)):
            rows = slice(row, row + num_nodes)
            experts, held = _distinct(loads[layer], node_experts[rows], local[rows], num_groups // num_nodes, sizes[1])
            node_experts[rows], counts[rows] = experts, held.sum(axis=1)
            local[rows], replica[rows] = _numbered(held)

    layers = len(loads)
    physical_to_logical_map = np.take_along_axis(node_experts, local, axis=1).reshape(layers, -1)
    logical_replica_count = np.zeros((layers, num_experts), np.int64)
    np.put_along_axis(logical_replica_count, node_experts.reshape(layers, -1), counts.reshape(layers, -1), axis=1)
    return ExpertPlacement(
        physical_to_logical_map=physical_to_logical_map,
        replica_index=replica.reshape(layers, -1),
        logical_replica_count=logical_replica_count,
        num_ranks=num_ranks,
    )


def check_algorithm(algorithm: str) -> None:
    """Raise ConfigError if the algorithm is unknown."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm={algorithm!r} must be one of {', '.join(ALGORITHMS)}")


def _eplb(loads: np.ndarray, num_replicas: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place by the published algorithm: (expert of each slot [X,R], its replica index [X,R], replica counts [X,N])."""
    local, replica, counts = _replicate(loads, num_replicas)
    load_at = np.take_along_axis(loads / counts, local, axis=1)
    rank, slot = _pack(load_at, num_ranks)
    order = np.argsort(rank * (num_replicas // num_ranks) + slot, axis=1)
    return np.take_along_axis(local, order, axis=1), np.take_along_axis(replica, order, axis=1), counts


def _distinct(
    loads: np.ndarray, experts: np.ndarray, published: np.ndarray, num_groups: int, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct placement of one layer: (experts of each node [M,N], replicas on the node's ranks [M,R,N]).

    loads [E]: load of each expert. experts [M,N]: experts of each node, in num_groups groups. published [M,P]: expert
    of each slot by _eplb. While the most loaded rank has more load than by _eplb, swaps of two groups between nodes are
    tried.
    """

    def spread_over(experts: np.ndarray, local: np.ndarray, tries: int) -> tuple[float, np.ndarray]:
        held = []
        for own, by_rank in zip(loads[experts], local.reshape(len(experts), num_ranks, -1), strict=True):
            other = np.stack([np.bincount(at, minlength=len(own)) for at in by_rank])
            held.append(spread(own, by_rank.shape[1], num_ranks, other, tries=tries))
        return max(float(rank_loads(*pair).max()) for pair in zip(held, loads[experts], strict=True)), np.stack(held)

    counts = np.stack([np.bincount(at, minlength=experts.shape[1]) for at in published])
    carried = np.take_along_axis(loads[experts] / counts, published, axis=1)
    most = float(carried.reshape(len(experts) * num_ranks, -1).sum(axis=1).max())
    most += gain_of(loads, len(experts) * num_ranks)
    best, (fullest, held) = experts, spread_over(experts, published, MAX_TRIES)
    for other in islice(_exchanged(experts, num_groups), _MAX_EXCHANGES):
        if fullest <= most:
            break
        local, _, _ = _eplb(loads[other], published.shape[1], num_ranks)
        now, other_held = spread_over(other, local, _FEWER_TRIES)
        if now < fullest:
            best, fullest, held = other, now, other_held
    return best, held


def _exchanged(experts: np.ndarray, num_groups: int) -> Iterator[np.ndarray]:
    """Yield the experts of each node [M,N] for every swap of two groups between different nodes."""
    nodes = len(experts)
    by_group = experts.reshape(nodes * num_groups, -1)
    for one, two in combinations(range(len(by_group)), 2):
        if one // num_groups != two // num_groups:
            order = np.arange(len(by_group))
            order[[one, two]] = two, one
            yield by_group[order].reshape(nodes, -1)


def _numbered(held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (expert of each slot [M,P], its replica index [M,P]) for replica counts on ranks [M,R,N]."""
    local, replica = [], []
    for ranks in held:
        local.append(np.concatenate([np.repeat(np.arange(len(own)), own) for own in ranks]))
        seen = np.zeros(ranks.shape[1], np.int64)
        numbers = []
        for expert in local[-1]:
            numbers.append(seen[expert])
            seen[expert] += 1
        replica.append(np.array(numbers))
    return np.stack(local), np.stack(replica)


def sources_of(old: np.ndarray, new: np.ndarray, share: int) -> np.ndarray:
    """Return, for the expert of each slot [R] in `new`, a slot of `old` that has it.

    The slot is on the same rank if possible, else the first one. share: slots per rank.
    """
    sources = np.empty(len(new), np.int32)
    for slot, expert in enumerate(new):
        (there,) = np.nonzero(old == expert)
        near = there[there // share == slot // share]
        sources[slot] = near[0] if len(near) else there[0]
    return sources


def _groups_to_nodes(loads: np.ndarray, num_groups: int, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign groups to nodes and return the loads and the ids of each node's experts, both [layers*nodes, E/nodes]."""
    layers, num_experts = loads.shape
    size = num_experts // num_groups
    node, slot = _pack(loads.reshape(layers, num_groups, size).sum(axis=-1), num_nodes)
    groups = np.argsort(node * (num_groups // num_nodes) + slot, axis=1)
    experts = (groups[:, :, None] * size + np.arange(size)).reshape(layers * num_nodes, -1)
    by_node = np.take_along_axis(loads, experts.reshape(layers, -1), axis=1)
    return by_node.reshape(experts.shape), experts


def _pack(loads: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (pack, index within the pack) of every item [X,N]: heaviest first, into the lightest pack with room."""
    room = loads.shape[1] // num_packs
    pack, slot = np.zeros(loads.shape, np.int64), np.zeros(loads.shape, np.int64)
    if room == 1:
        pack[:] = np.arange(num_packs)
        return pack, slot
    for row, heaviest_first in enumerate(np.argsort(-loads, axis=1, kind="stable")):
        weight, held = np.zeros(num_packs), np.zeros(num_packs, np.int64)
        for item in heaviest_first:
            to = int(np.argmin(np.where(held < room, weight, np.inf)))
            pack[row, item], slot[row, item] = to, held[to]
            weight[to] += loads[row, item]
            held[to] += 1
    return pack, slot


def _replicate(loads: np.ndarray, num_replicas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (expert of each replica [X,R], its replica index [X,R], replicas per expert [X,N]).

    Each expert has one replica; every further one goes to the expert with the highest load per replica.
    """
    rows, num_experts = loads.shape
    every = np.arange(rows)
    expert = np.tile(np.arange(num_replicas), (rows, 1))
    replica = np.zeros((rows, num_replicas), np.int64)
    counts = np.ones((rows, num_experts), np.int64)
    for at in range(num_experts, num_replicas):
        fullest = np.argmax(loads / counts, axis=1)
        expert[:, at], replica[:, at] = fullest, counts[every, fullest]
        counts[every, fullest] += 1
    return expert, replica, counts

"""Replicas of experts dealt to ranks so that no rank has two of one expert, and the fullest rank gets little.

One row at a time: the experts of a layer, or of one node of it. A first placement is made greedily and one more comes
from another placement; both are repaired and then improved step by step, each step lowering the fullest rank, and the
better one is kept. Everything is deterministic: of equal choices the one with the lowest index is taken.
"""

# Dims: N experts of a row, R ranks. `held` [R,N]: replicas of each expert on each rank.
from __future__ import annotations

import numpy as np

_MAX_STEPS = 2000  # of improvement
MAX_TRIES = 128  # of a changed placement, for each row
_MIN_GAIN = 1e-12  # of the load of an even rank: less is rounding


def spread(loads: np.ndarray, places: int, num_ranks: int, other: np.ndarray, *, tries: int = MAX_TRIES) -> np.ndarray:
    """Place replicas of experts with `loads` [N] at `places` places of each rank: `held` [R,N].

    No rank has two replicas of one expert where places <= N. other [R,N]: a placement to improve on as well, and to be
    no less even than: while the fullest rank has more than there, up to `tries` changed placements are tried; where a
    rank has more places than there are experts `other` itself will do.
    """
    counts = _capped_counts(loads, places * num_ranks, num_ranks)
    most = float(rank_loads(other, loads).max()) + gain_of(loads, num_ranks)
    best, least = other, np.inf if places <= len(loads) else most
    rng = np.random.default_rng(0)
    for attempt in range(2 + tries):
        if attempt == 0:
            held = _greedy(loads, counts, places, num_ranks)
        elif attempt == 1:
            held = _with_counts(loads, other, counts)
        elif least <= most:
            break
        else:
            held = best.copy()
            _shake(held, rng)
        _separate(held, loads)
        _improve(held, loads)
        if (fullest := float(rank_loads(held, loads).max())) < least:
            best, least = held, fullest
    return best


def gain_of(loads: np.ndarray, num_ranks: int) -> float:
    """Load of a rank below which a difference is rounding."""
    return _MIN_GAIN * max(float(loads.sum()) / num_ranks, 1e-300)


def _shake(held: np.ndarray, rng: np.random.Generator) -> None:
    """Exchange a few replicas between ranks chosen at random, or give their places to other experts."""
    for _ in range(int(rng.integers(1, 4))):
        rank, other = rng.integers(len(held), size=2)
        own = int(rng.choice(np.flatnonzero(held[rank])))
        if rng.integers(2) and held[:, own].sum() > 1:
            missing = np.flatnonzero((held[rank] == 0) & (held.sum(axis=0) < len(held)))
            if len(missing):
                held[rank, own] -= 1
                held[rank, rng.choice(missing)] += 1
            continue
        back = int(rng.choice(np.flatnonzero(held[other])))
        for at, gone, come in ((rank, own, back), (other, back, own)):
            held[at, gone] -= 1
            held[at, come] += 1


def rank_loads(held: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Sum the load on each rank [R], where an expert's is shared evenly by its replicas."""
    return held @ (loads / held.sum(axis=0))


def _capped_counts(loads: np.ndarray, num_replicas: int, num_ranks: int) -> np.ndarray:
    """Replicas of each expert [N]: one, and every further one to the expert whose replicas carry most, of those that
    some rank lacks; where every rank has every expert, of all."""
    counts = np.ones(len(loads), np.int64)
    for _ in range(num_replicas - len(loads)):
        lacking = counts < num_ranks
        carried = loads / counts
        counts[np.argmax(np.where(lacking, carried, -1.0) if lacking.any() else carried)] += 1
    return counts


def _greedy(loads: np.ndarray, counts: np.ndarray, places: int, num_ranks: int) -> np.ndarray:
    """Deal out experts, the heaviest replicas first, each to the lightest ranks that have room and lack it."""
    held = np.zeros((num_ranks, len(loads)), np.int64)
    weight, room = np.zeros(num_ranks), np.full(num_ranks, places)
    carried = loads / counts
    for expert in np.argsort(-carried, kind="stable"):
        for _ in range(counts[expert]):
            free = room > 0
            lacking = free & (held[:, expert] == 0)
            to = int(np.argmin(np.where(lacking if lacking.any() else free, weight, np.inf)))
            held[to, expert] += 1
            weight[to] += carried[expert]
            room[to] -= 1
    return held


def _with_counts(loads: np.ndarray, held: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A placement with replicas exchanged until each expert has as many as `counts` says."""
    held = held.copy()
    while (more := held.sum(axis=0) - counts).any():
        gives, takes = int(np.argmax(more)), int(np.argmin(more))
        weight = rank_loads(held, loads)
        twice = held[:, gives] > 1 if (held[:, gives] > 1).any() else held[:, gives] > 0
        fits = twice & (held[:, takes] == 0)
        rank = int(np.argmax(np.where(fits if fits.any() else twice, weight, -1.0)))
        held[rank, gives] -= 1
        held[rank, takes] += 1
    return held


def _separate(held: np.ndarray, loads: np.ndarray) -> None:
    """Exchange replicas between ranks until no rank has two of an expert that another lacks."""
    while True:
        twice = np.argwhere((held > 1) & (held == 0).any(axis=0))
        if not len(twice):
            return
        carried, weight = loads / held.sum(axis=0), rank_loads(held, loads)
        rank, expert = twice[0]
        best: tuple[float, int, int] | None = None
        for other in np.flatnonzero(held[:, expert] == 0):
            # One of these always exists: with an expert that `rank` lacks or one that `other` has twice, one pair less.
            fits = (held[other] > 0) & ((held[rank] == 0) | (held[other] > 1))
            fits[expert] = False
            for back in np.flatnonzero(fits):
                moved = carried[expert] - carried[back]
                fullest = float(max(weight[rank] - moved, weight[other] + moved))
                if best is None or (fullest, int(other), int(back)) < best:
                    best = fullest, int(other), int(back)
        assert best is not None
        _, to, taken = best
        held[rank, expert] -= 1
        held[to, expert] += 1
        held[to, taken] -= 1
        held[rank, taken] += 1


def _improve(held: np.ndarray, loads: np.ndarray) -> None:
    """Exchange replicas between ranks, or a replica for one of another expert, while the fullest rank gets less."""
    gain = gain_of(loads, len(held))
    for _ in range(_MAX_STEPS):
        weight = rank_loads(held, loads)
        fullest = int(np.argmax(weight))
        if not (_exchange(held, loads, weight, fullest, gain) or _replace(held, loads, weight, fullest, gain)):
            return


def _exchange(held: np.ndarray, loads: np.ndarray, weight: np.ndarray, fullest: int, gain: float) -> bool:
    """Make the exchange of one replica each between the fullest rank and another that leaves the fuller of the two
    with least, if both then have less than the fullest had."""
    carried = loads / held.sum(axis=0)
    own = np.flatnonzero(held[fullest])
    moved = carried[own][:, None, None] - carried[None, None, :]  # [own, rank, N], rank of 1
    there = weight[None, :, None] + moved
    here = weight[fullest] - moved
    fits = (held > 0)[None] & (held[:, own] == 0).T[:, :, None] & (held[fullest] == 0)[None, None]
    pair = np.where(fits, np.maximum(there, here), np.inf)
    at = int(np.argmin(pair))
    if not pair.flat[at] < weight[fullest] - gain:
        return False
    which, rank, back = np.unravel_index(at, pair.shape)
    held[fullest, own[which]] -= 1
    held[rank, own[which]] += 1
    held[rank, back] -= 1
    held[fullest, back] += 1
    return True


def _replace(held: np.ndarray, loads: np.ndarray, weight: np.ndarray, fullest: int, gain: float) -> bool:
    """Give one place on some rank from an expert with several replicas to another expert, if every rank that this
    changes then has less than the fullest had."""
    counts = held.sum(axis=0)
    best: tuple[float, int, int, int] | None = None
    for rank in range(len(held)):
        gives = np.flatnonzero((held[rank] > 0) & (counts > 1))
        takes = np.flatnonzero((held[rank] == 0) & ((held[fullest] > 0) | (rank == fullest)))
        if not len(gives) or not len(takes):
            continue
        fewer = held[:, gives].astype(float)
        fewer[rank] -= 1
        less = fewer * (loads[gives] / (counts[gives] - 1)) - held[:, gives] * (loads[gives] / counts[gives])
        more = held[:, takes].astype(float)
        more[rank] += 1
        added = more * (loads[takes] / (counts[takes] + 1)) - held[:, takes] * (loads[takes] / counts[takes])
        after = weight[:, None, None] + less[:, :, None] + added[:, None, :]
        changed = (held[:, gives] > 0)[:, :, None] | (held[:, takes] > 0)[:, None, :]
        changed[fullest] = changed[rank] = True
        most = np.where(changed, after, -np.inf).max(axis=0)
        at = int(np.argmin(most))
        if most.flat[at] < weight[fullest] - gain and (best is None or most.flat[at] < best[0]):
            give, take = np.unravel_index(at, most.shape)
            best = float(most.flat[at]), rank, int(gives[give]), int(takes[take])
    if best is None:
        return False
    _, at_rank, given, taken = best
    held[at_rank, given] -= 1
    held[at_rank, taken] += 1
    return True

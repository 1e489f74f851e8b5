"""Assign replicas of experts to ranks with distinct experts per rank and a low load on the most loaded rank.

The functions work on one row at a time: the experts of a layer, or of a layer's experts on one node. One placement is
made greedily, and one starts from a given placement. Both are repaired and then improved by local search, in which each
step lowers the load of the most loaded rank. The better one wins. The result is deterministic: ties go to the lowest
index.
"""

# Dims: N experts of a row, R ranks. `held` [R,N]: number of replicas of each expert on each rank.
from __future__ import annotations

import numpy as np

_MAX_STEPS = 2000  # of local search
MAX_TRIES = 128  # perturbed placements per row
_MIN_GAIN = 1e-12  # relative to the mean load of a rank: less is rounding


def spread(loads: np.ndarray, places: int, num_ranks: int, other: np.ndarray, *, tries: int = MAX_TRIES) -> np.ndarray:
    """Assign replicas of experts with `loads` [N] to `places` slots of each rank and return `held` [R,N].

    No rank has two replicas of one expert if places <= N. other [R,N]: a second placement to start from, and the one to
    match: while the most loaded rank has more load than in `other`, up to `tries` perturbed placements are tried. If
    places > N, `other` itself is an acceptable result.
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
    """Return the load difference of a rank below which it counts as rounding."""
    return _MIN_GAIN * max(float(loads.sum()) / num_ranks, 1e-300)


def _shake(held: np.ndarray, rng: np.random.Generator) -> None:
    """Perturb a placement in place: swap a few replicas between random ranks, or replace them by other experts."""
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
    """Return the load of each rank [R]; the replicas of an expert share its load evenly."""
    return held @ (loads / held.sum(axis=0))


def _capped_counts(loads: np.ndarray, num_replicas: int, num_ranks: int) -> np.ndarray:
    """Return the number of replicas of each expert [N].

    Every expert gets one replica. Each further replica goes to the expert with the highest load per replica among the
    experts with fewer than num_ranks replicas, or among all experts once every rank has all.
    """
    counts = np.ones(len(loads), np.int64)
    for _ in range(num_replicas - len(loads)):
        lacking = counts < num_ranks
        carried = loads / counts
        counts[np.argmax(np.where(lacking, carried, -1.0) if lacking.any() else carried)] += 1
    return counts


def _greedy(loads: np.ndarray, counts: np.ndarray, places: int, num_ranks: int) -> np.ndarray:
    """Assign replicas, highest load first, to the least loaded rank with a free slot and no replica of the expert."""
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
    """Return a placement with replicas replaced until each expert has `counts` replicas."""
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
    """Swap replicas between ranks in place until no rank has two of an expert that another rank lacks."""
    while True:
        twice = np.argwhere((held > 1) & (held == 0).any(axis=0))
        if not len(twice):
            return
        carried, weight = loads / held.sum(axis=0), rank_loads(held, loads)
        rank, expert = twice[0]
        best: tuple[float, int, int] | None = None
        for other in np.flatnonzero(held[:, expert] == 0):
            # A candidate always exists: an expert that `rank` lacks or that `other` has twice. It leaves one pair less.
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
    """Swap replicas between ranks, or replace replicas, as long as the load of the most loaded rank falls."""
    gain = gain_of(loads, len(held))
    for _ in range(_MAX_STEPS):
        weight = rank_loads(held, loads)
        fullest = int(np.argmax(weight))
        if not (_exchange(held, loads, weight, fullest, gain) or _replace(held, loads, weight, fullest, gain)):
            return


def _exchange(held: np.ndarray, loads: np.ndarray, weight: np.ndarray, fullest: int, gain: float) -> bool:
    """Swap one replica of the most loaded rank with one of another rank, if both then have less than its load.

    The best swap minimizes the higher load of the two ranks. Return whether a swap was made.
    """
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
    """Replace one replica of an expert that has several by another expert, on any rank.

    Every rank whose load changes must then have less than the most loaded rank had. Return whether one was replaced.
    """
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

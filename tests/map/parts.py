"""Sums over the arrays of a map, by part of the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def bytes_by_part(arrays: Iterable[Mapping[str, Any]], axes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of one device by part of the model."""
    totals: Counter[str] = Counter()
    for one in arrays:
        split = math.prod(axes[axis] for names in one["axes"] for axis in names)
        totals[one["part"]] += one["times"] * one["itemsize"] * math.prod(one["shape"]) // split
    return dict(totals)

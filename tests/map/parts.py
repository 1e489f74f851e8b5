"""Sums over the arrays of a map, by part of the model, and a compile result that belongs to a map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_COMPARED = (
    "mesh", "layout", "virtual_stages", "dtype", "kv_dtype", "dispatch", "max_num_seqs", "context", "chunk_tokens",
    "family",
)  # fmt: skip


def answer_of(data: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return what jaxmoe compile would print if it found what was planned, with changes."""
    rows = [{key: row[key] for key in ("phase", "op", "axes", "bytes", "planned")} | {"count": row["planned"]}
            for row in data["collectives"]]  # fmt: skip
    size = data["bytes"] | {"temp": 5, "total": 6, "limit": 7}
    same = {name: data[name] for name in _COMPARED}
    return same | {"target": "h100:1x8", "bytes": size, "collectives": rows} | changes


def bytes_by_part(arrays: Iterable[Mapping[str, Any]], axes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of one device by part of the model."""
    totals: Counter[str] = Counter()
    for one in arrays:
        split = math.prod(axes[axis] for names in one["axes"] for axis in names)
        totals[one["part"]] += one["times"] * one["itemsize"] * math.prod(one["shape"]) // split
    return dict(totals)

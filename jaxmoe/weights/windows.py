"""Windows of a parameter, and which weight slices of the checkpoint's tensors lie in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

from jaxmoe.weight_slice import ArrayIndex, WeightSlice

Window = tuple[tuple[int, int], ...]
Cut = tuple[slice, ...]  # of a tensor, without its leading dim where a weight slice fixes an index of that


def intersect(a: Window, b: Window) -> Window | None:
    """What both hold, None where that is nothing."""
    both = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def overlap(weight_slice: WeightSlice, window: Window) -> tuple[Cut, ArrayIndex] | None:
    """The part of a weight slice inside a window of its parameter: a cut of the tensor, and a place within the
    window."""
    index: list[int | slice] = []
    ranges: list[tuple[int, int]] = []
    for at, (low, high) in zip(weight_slice.dst, window, strict=True):
        if isinstance(at, int):
            if not low <= at < high:
                return None
            index.append(at - low)
            continue
        start, stop = max(at.start, low), min(at.stop, high)
        if start >= stop:
            return None
        index.append(slice(start - low, stop - low))
        ranges.append((start - at.start, stop - at.start))
    ordered = reversed(ranges) if weight_slice.transpose else ranges
    cut = tuple(_part(whole, *span) for whole, span in zip(weight_slice.cut, ordered, strict=True))
    return cut, tuple(index)


def _part(whole: slice, low: int, high: int) -> slice:
    """Entries low up to high of those that a slice takes."""
    step = whole.step or 1
    return slice(whole.start + low * step, min(whole.start + high * step, whole.stop), step)


class WeightSliceIndex:
    """The weight slices of one parameter by the indices they fix (layer, expert, head): only those of a window are
    tested."""

    def __init__(self, parts: Iterable[WeightSlice]) -> None:
        self._by_index: dict[ArrayIndex, list[WeightSlice]] = defaultdict(list)
        self._fixed: list[int] = []
        for weight_slice in parts:
            self._fixed = [dim for dim, at in enumerate(weight_slice.dst) if isinstance(at, int)]  # alike in all
            self._by_index[tuple(weight_slice.dst[dim] for dim in self._fixed)].append(weight_slice)

    def inside(self, window: Window) -> Iterator[tuple[WeightSlice, Cut, ArrayIndex]]:
        """Every weight slice that overlaps the window, with its cut and place as `overlap` gives them."""
        for index in product(*(range(*window[dim]) for dim in self._fixed)):
            for weight_slice in self._by_index.get(index, ()):
                if (hit := overlap(weight_slice, window)) is not None:
                    yield weight_slice, *hit

"""Windows of a parameter, and the weight slices of checkpoint tensors that overlap them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

from jaxmoe.weight_slice import ArrayIndex, WeightSlice

Window = tuple[tuple[int, int], ...]
Cut = tuple[slice, ...]  # slices of a tensor, without its first dim if the weight slice fixes an index there


def intersect(a: Window, b: Window) -> Window | None:
    """Return the intersection of two windows; None if it is empty."""
    both = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def overlap(weight_slice: WeightSlice, window: Window) -> tuple[Cut, ArrayIndex] | None:
    """Return the part of a weight slice inside a window of its parameter; None if they do not overlap.

    The part is a cut of the tensor, and the index of its destination within the window.
    """
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
    """Return the slice of entries low..high among those that `whole` selects."""
    step = whole.step or 1
    return slice(whole.start + low * step, min(whole.start + high * step, whole.stop), step)


class WeightSliceIndex:
    """Index the weight slices of one parameter by their fixed indices (layer, expert, head).

    A lookup tests only weight slices with indices inside the window.
    """

    def __init__(self, parts: Iterable[WeightSlice]) -> None:
        self._by_index: dict[ArrayIndex, list[WeightSlice]] = defaultdict(list)
        self._fixed: list[int] = []
        for weight_slice in parts:
            # The dims are the same in all weight slices of a parameter.
            self._fixed = [dim for dim, at in enumerate(weight_slice.dst) if isinstance(at, int)]
            self._by_index[tuple(weight_slice.dst[dim] for dim in self._fixed)].append(weight_slice)

    def inside(self, window: Window) -> Iterator[tuple[WeightSlice, Cut, ArrayIndex]]:
        """Yield every weight slice that overlaps the window, with its cut and index as `overlap` returns them."""
        for index in product(*(range(*window[dim]) for dim in self._fixed)):
            for weight_slice in self._by_index.get(index, ()):
                if (hit := overlap(weight_slice, window)) is not None:
                    yield weight_slice, *hit

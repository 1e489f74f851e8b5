"""Windows of a parameter, and which pieces of the checkpoint's tensors lie in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

from jaxmoe.families.weight_slice import Piece, Place

Window = tuple[tuple[int, int], ...]
Cut = tuple[slice, ...]  # of a tensor, without its leading dim where a piece fixes an index of that


def intersect(a: Window, b: Window) -> Window | None:
    """What both hold, None where that is nothing."""
    both = tuple((max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def overlap(piece: Piece, window: Window) -> tuple[Cut, Place] | None:
    """The part of a piece inside a window of its parameter: a cut of the tensor, and a place within the window."""
    place: list[int | slice] = []
    ranges: list[tuple[int, int]] = []
    for at, (low, high) in zip(piece.dst, window, strict=True):
        if isinstance(at, int):
            if not low <= at < high:
                return None
            place.append(at - low)
            continue
        start, stop = max(at.start, low), min(at.stop, high)
        if start >= stop:
            return None
        place.append(slice(start - low, stop - low))
        ranges.append((start - at.start, stop - at.start))
    ordered = reversed(ranges) if piece.transpose else ranges
    cut = tuple(_part(whole, *span) for whole, span in zip(piece.cut, ordered, strict=True))
    return cut, tuple(place)


def _part(whole: slice, low: int, high: int) -> slice:
    """Entries low up to high of those that a slice takes."""
    step = whole.step or 1
    return slice(whole.start + low * step, min(whole.start + high * step, whole.stop), step)


class PiecesByIndex:
    """The pieces of one parameter by the indices they fix (layer, expert, head): only those of a window are tested."""

    def __init__(self, parts: Iterable[Piece]) -> None:
        self._by_index: dict[Place, list[Piece]] = defaultdict(list)
        self._fixed: list[int] = []
        for piece in parts:
            self._fixed = [dim for dim, at in enumerate(piece.dst) if isinstance(at, int)]  # alike in all
            self._by_index[tuple(piece.dst[dim] for dim in self._fixed)].append(piece)

    def inside(self, window: Window) -> Iterator[tuple[Piece, Cut, Place]]:
        """Every piece that overlaps the window, with its cut and place as `overlap` gives them."""
        for index in product(*(range(*window[dim]) for dim in self._fixed)):
            for piece in self._by_index.get(index, ()):
                if (hit := overlap(piece, window)) is not None:
                    yield piece, *hit

"""One rectangle of a published tensor, and where in which parameter it lies."""

from __future__ import annotations

from dataclasses import dataclass

Place = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One rectangle of a published tensor and where it goes.

    src: for each dim of the tensor a slice with explicit bounds and step, or, of the first, a fixed index. dst: for
    each dim of the parameter a fixed index or a slice with explicit bounds, one after the other; its slices, in order,
    are those of src (in reverse order where transpose).
    """

    key: str
    key_shape: tuple[int, ...]
    src: Place
    path: str
    dst: Place
    transpose: bool = False

    @property
    def lead(self) -> int | None:
        """The index of the tensor's first dim that src fixes; None where it fixes none."""
        return self.src[0] if self.src and isinstance(self.src[0], int) else None

    @property
    def cut(self) -> tuple[slice, ...]:
        """The slices of src."""
        return tuple(one for one in self.src if isinstance(one, slice))


def _all(shape: tuple[int, ...]) -> Place:
    return tuple(slice(0, n) for n in shape)


def whole(key: str, shape: tuple[int, ...], path: str, *, transpose: bool = False, dst: Place | None = None) -> Piece:
    """A piece that is all of its tensor; dst is all of the parameter by default."""
    place = _all(tuple(reversed(shape)) if transpose else shape) if dst is None else dst
    return Piece(key=key, key_shape=shape, src=_all(shape), path=path, dst=place, transpose=transpose)

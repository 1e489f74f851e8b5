"""One rectangle of a checkpoint tensor, and where in which parameter it lies."""

from __future__ import annotations

from dataclasses import dataclass

ArrayIndex = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """One rectangle of a checkpoint tensor and where it goes.

    src: for each dim of the tensor a slice with explicit bounds and step, or, of the first, a fixed index. dst: for
    each dim of the parameter a fixed index or a slice with explicit bounds, one after the other; its slices, in order,
    are those of src (in reverse order where transpose).
    """

    key: str
    key_shape: tuple[int, ...]
    src: ArrayIndex
    path: str
    dst: ArrayIndex
    transpose: bool = False

    @property
    def lead(self) -> int | None:
        """The index of the tensor's first dim that src fixes; None where it fixes none."""
        return self.src[0] if self.src and isinstance(self.src[0], int) else None

    @property
    def cut(self) -> tuple[slice, ...]:
        """The slices of src."""
        return tuple(one for one in self.src if isinstance(one, slice))


def _full_index(shape: tuple[int, ...]) -> ArrayIndex:
    return tuple(slice(0, n) for n in shape)


def full_slice(
    key: str, shape: tuple[int, ...], path: str, *, transpose: bool = False, dst: ArrayIndex | None = None
) -> WeightSlice:
    """A weight slice that is all of its tensor; dst is all of the parameter by default."""
    index = _full_index(tuple(reversed(shape)) if transpose else shape) if dst is None else dst
    return WeightSlice(key=key, key_shape=shape, src=_full_index(shape), path=path, dst=index, transpose=transpose)

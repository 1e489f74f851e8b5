"""Mapping of a rectangle of one checkpoint tensor to its place in a model parameter."""

from __future__ import annotations

from dataclasses import dataclass

ArrayIndex = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """Map a rectangle of one checkpoint tensor to a model parameter.

    Attributes:
        key: name of the checkpoint tensor.
        key_shape: shape of the checkpoint tensor.
        src: a slice with explicit bounds and step for each dim of the tensor; the first dim may have a fixed index.
        path: path of the parameter in the model.
        dst: a fixed index or a contiguous slice with explicit bounds for each dim of the parameter. Its slices
            correspond to the slices of src in order, or in reverse order if transpose.
        transpose: whether the parameter stores the rectangle transposed.
    """

    key: str
    key_shape: tuple[int, ...]
    src: ArrayIndex
    path: str
    dst: ArrayIndex
    transpose: bool = False

    @property
    def lead(self) -> int | None:
        """Return the fixed index of the tensor's first dim, or None if src slices that dim."""
        return self.src[0] if self.src and isinstance(self.src[0], int) else None

    @property
    def cut(self) -> tuple[slice, ...]:
        """Return src without its fixed index, if it has one."""
        return tuple(one for one in self.src if isinstance(one, slice))


def _full_index(shape: tuple[int, ...]) -> ArrayIndex:
    return tuple(slice(0, n) for n in shape)


def full_slice(
    key: str, shape: tuple[int, ...], path: str, *, transpose: bool = False, dst: ArrayIndex | None = None
) -> WeightSlice:
    """Return a weight slice of a whole tensor. dst is the whole parameter by default."""
    index = _full_index(tuple(reversed(shape)) if transpose else shape) if dst is None else dst
    return WeightSlice(key=key, key_shape=shape, src=_full_index(shape), path=path, dst=index, transpose=transpose)

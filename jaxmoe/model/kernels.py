"""Which implementation of each step of the model runs; every choice means the same."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DISPATCH_KINDS, DispatchKind
from jaxmoe.ops.grouped import GROUPED_KINDS, GroupedKind
from jaxmoe.ops.linear import LINEAR_KINDS, LinearKind
from jaxmoe.ops.paged import PAGED_KINDS, PagedKind


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One choice a step: see ops/dispatch.py, ops/grouped.py, ops/linear.py and ops/paged.py.

    Raises: ConfigError for a name that is none of a step's.
    """

    dispatch: DispatchKind = "all_to_all"
    grouped: GroupedKind = "blocks"
    linear: LinearKind = "xla"
    attention: PagedKind = "loop"

    def __post_init__(self) -> None:
        for name, kinds in (
            ("dispatch", DISPATCH_KINDS),
            ("grouped", GROUPED_KINDS),
            ("linear", LINEAR_KINDS),
            ("attention", PAGED_KINDS),
        ):
            value = getattr(self, name)
            if value not in kinds:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(kinds)}")

    def prepare(self, dtype: str) -> None:
        """Make ready what runs outside XLA, for arrays of dtype. Raises: ConfigError where it cannot run here."""
        for name in ("grouped", "linear", "attention"):
            if getattr(self, name) == "native":
                native.prepare(dtype, option=name)

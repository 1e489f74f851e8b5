"""Which implementation of each step of the model runs; every choice means the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DISPATCH_KINDS, DispatchKind
from jaxmoe.ops.grouped import GROUPED_KINDS, GroupedKind
from jaxmoe.ops.linear import LINEAR_KINDS, LinearKind
from jaxmoe.ops.paged import PAGED_KINDS, PagedKind

STEPS = ("dispatch", "grouped", "linear", "attention")
NATIVE_STEPS = ("grouped", "linear", "attention")
_log = logging.getLogger("jaxmoe")


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
        for name in NATIVE_STEPS:
            if getattr(self, name) == "native":
                native.prepare(dtype, option=name)


Choice = Kernels | Mapping[str, Any]  # all steps, or those of them that somebody chose


def check_kernels(dtype: str, choice: Choice) -> None:
    """Raises: ConfigError for a step or a kernel that does not exist, or one that cannot run here. Compiles nothing."""
    named = vars(choice) if isinstance(choice, Kernels) else choice
    for name in named:
        if name not in STEPS:
            raise ConfigError(f"kernels has {name!r}; the steps are {', '.join(STEPS)}")
    for name, kind in vars(Kernels(**named)).items():
        if kind == "native":
            native.check(dtype, option=name)


def prepare_kernels(dtype: str, choice: Choice) -> Kernels:
    """The kernels, ready for arrays of dtype; for steps that nobody chose what is fastest here.

    That is native on a CPU with a C++ compiler (a warning is logged where there is none), ragged on a TPU for the
    experts, and XLA's form otherwise. Raises: ConfigError where a kernel that was chosen cannot run.
    """
    named = vars(choice) if isinstance(choice, Kernels) else choice
    unnamed = [name for name in NATIVE_STEPS if name not in named]
    backend, fast = jax.default_backend(), {}
    if backend == "tpu" and "grouped" in unnamed:
        fast = {"grouped": "ragged"}
    if backend == "cpu" and unnamed and dtype in native.DTYPES:
        try:
            native.prepare(dtype, option=unnamed[0])
            fast = dict.fromkeys(unnamed, "native")
        except ConfigError as error:
            _log.warning("jaxmoe: generation runs slower than it could: %s", error)
    kernels = Kernels(**{**named, **fast})
    kernels.prepare(dtype)
    return kernels

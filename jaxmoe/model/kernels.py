"""Which implementation of each step of the model runs; every choice means the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxmoe.depth import LAYERS_KINDS, LayersKind
from jaxmoe.errors import ConfigError
from jaxmoe.formats import Quantisation
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DISPATCH_KINDS, DispatchKind
from jaxmoe.ops.grouped import GROUPED_KINDS, GroupedKind
from jaxmoe.ops.linear import LINEAR_KINDS, LinearKind
from jaxmoe.ops.paged import PAGED_KINDS, PagedKind
from jaxmoe.ops.pointwise import POINTWISE_KINDS, PointwiseKind
from jaxmoe.ops.sample import SAMPLING_KINDS, SamplingKind

STEPS = ("dispatch", "grouped", "linear", "attention", "pointwise", "sampling", "layers")
NATIVE_STEPS = ("grouped", "linear", "attention", "pointwise", "sampling")
_log = logging.getLogger("jaxmoe")
_SLOWER = "jaxmoe: generation runs slower than it could: %s"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One choice a step: see dispatch.py, grouped.py, linear.py, paged.py, pointwise.py and sample.py of ops/.

    layers: scan runs alike layers in a loop that is compiled once, unroll compiles each by itself (depth.py).
    Raises: ConfigError for a name that is none of a step's.
    """

    dispatch: DispatchKind = "all_to_all"
    grouped: GroupedKind = "blocks"
    linear: LinearKind = "xla"
    attention: PagedKind = "loop"
    pointwise: PointwiseKind = "xla"
    sampling: SamplingKind = "xla"
    layers: LayersKind = "scan"

    def __post_init__(self) -> None:
        for name, kinds in (
            ("dispatch", DISPATCH_KINDS),
            ("grouped", GROUPED_KINDS),
            ("linear", LINEAR_KINDS),
            ("attention", PAGED_KINDS),
            ("pointwise", POINTWISE_KINDS),
            ("sampling", SAMPLING_KINDS),
            ("layers", LAYERS_KINDS),
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


def choose_kernels(
    dtype: str, choice: Choice, *, platform: str | None = None, shared_pages: bool = False,
    quantisation: Quantisation | None = None,
) -> Kernels:  # fmt: skip
    """The kernels chosen, and for steps that nobody chose what is fastest on a platform: this one, where none is named.

    shared_pages: whether ranks hold parts of every page, which the loop alone can read. quantisation: of the model's
    matrices, which native kernels do not read.

    Compiles nothing.
    That is native on a CPU with a C++ compiler (a warning is logged where there is none), and XLA's form otherwise. On
    a CPU XLA's products want every layer's weights by themselves: unroll.
    Raises: ConfigError for a step or a kernel that does not exist, or one that was chosen and cannot run here.
    """
    named = dict(vars(choice) if isinstance(choice, Kernels) else choice)
    for name in named:
        if name not in STEPS:
            raise ConfigError(f"kernels has {name!r}; the steps are {', '.join(STEPS)}")
    if shared_pages and named.setdefault("attention", "loop") != "loop":
        raise ConfigError(
            f"attention={named['attention']} reads whole pages, this layout shares them out over a context: use loop"
        )
    if quantisation is not None:
        _choose_for_quantised(named, quantisation, dtype)
    for name, kind in vars(Kernels(**named)).items():
        if kind == "native":
            native.check(dtype, option=name)
    platform = platform or jax.default_backend()
    unnamed = [] if isinstance(choice, Kernels) else [name for name in NATIVE_STEPS if name not in named]
    if platform == "cpu" and unnamed and dtype in native.DTYPES:
        try:
            native.check(dtype, option=unnamed[0])
            named |= dict.fromkeys(unnamed, "native")
        except ConfigError as error:
            _log.warning(_SLOWER, error)
    if platform == "cpu" and named.get("linear") != "native":
        named.setdefault("layers", "unroll")
    return Kernels(**named)


def _choose_for_quantised(named: dict[str, Any], quantisation: Quantisation, dtype: str) -> None:
    """Leave the native kernels to plain weights. Other products that linear runs may be native where these are not."""
    held = {
        "grouped": quantisation.holds("moe/experts/"),
        "linear": quantisation.holds("attention/", "mlp/", "moe/shared/"),
    }
    for step in (step for step, some in held.items() if some):
        if named.get(step) == "native":
            raise ConfigError(
                f"{step}=native reads plain weights, those of this model are {quantisation.format.dtype}: leave it "
                f"out, or give weights_dtype (--weights-dtype) {dtype}"
            )
    if held["grouped"]:
        named.setdefault("grouped", "blocks")


def prepare_kernels(dtype: str, choice: Choice, kernels: Kernels) -> Kernels:
    """The kernels, ready for arrays of dtype; XLA's in place of native ones that nobody chose and that do not compile
    here (a warning is logged), whose products want layers by themselves.

    Raises: ConfigError where a kernel that was chosen cannot run.
    """
    unnamed = _unnamed(choice)
    try:
        kernels.prepare(dtype)
    except ConfigError as error:
        plain = Kernels()
        kernels = replace(kernels, **{name: getattr(plain, name) for name in unnamed})
        if isinstance(choice, Mapping) and "layers" not in choice and kernels.linear == "xla":
            kernels = replace(kernels, layers="unroll")
        kernels.prepare(dtype)
        _log.warning(_SLOWER, error)
    return kernels


def _unnamed(choice: Choice) -> list[str]:
    """Steps with a native kernel that nobody chose one for."""
    return [] if isinstance(choice, Kernels) else [name for name in NATIVE_STEPS if name not in choice]

"""Which implementation of each step of the model runs; every choice means the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DISPATCH_BACKENDS, DispatchBackend
from jaxmoe.ops.grouped import GROUPED_BACKENDS, GroupedBackend
from jaxmoe.ops.linear import LINEAR_BACKENDS, LinearBackend
from jaxmoe.ops.paged import PAGED_BACKENDS, PagedBackend
from jaxmoe.ops.pointwise import POINTWISE_BACKENDS, PointwiseBackend
from jaxmoe.ops.sample import SAMPLING_BACKENDS, SamplingBackend
from jaxmoe.parallel.stages import LAYERS_MODES, LayersMode
from jaxmoe.quantization.formats import WeightQuantization

OPS = ("dispatch", "grouped", "linear", "attention", "pointwise", "sampling", "layers")
NATIVE_OPS = ("grouped", "linear", "attention", "pointwise", "sampling")
_log = logging.getLogger("jaxmoe")
_SLOWER = "jaxmoe: generation runs slower than it could: %s"


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """One choice a step: see dispatch.py, grouped.py, linear.py, paged.py, pointwise.py and sample.py of ops/.

    layers: scan runs alike layers in a loop that is compiled once, unroll compiles each by itself (parallel/stages.py).
    Raises: ConfigError for a name that is none of a step's.
    """

    dispatch: DispatchBackend = "all_to_all"
    grouped: GroupedBackend = "blocks"
    linear: LinearBackend = "xla"
    attention: PagedBackend = "loop"
    pointwise: PointwiseBackend = "xla"
    sampling: SamplingBackend = "xla"
    layers: LayersMode = "scan"

    def __post_init__(self) -> None:
        for name, backends in (
            ("dispatch", DISPATCH_BACKENDS),
            ("grouped", GROUPED_BACKENDS),
            ("linear", LINEAR_BACKENDS),
            ("attention", PAGED_BACKENDS),
            ("pointwise", POINTWISE_BACKENDS),
            ("sampling", SAMPLING_BACKENDS),
            ("layers", LAYERS_MODES),
        ):
            value = getattr(self, name)
            if value not in backends:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(backends)}")

    def prepare(self, dtype: str) -> None:
        """Make ready what runs outside XLA, for arrays of dtype. Raises: ConfigError where it cannot run here."""
        for name in NATIVE_OPS:
            if getattr(self, name) == "native":
                native.prepare(dtype, option=name)


KernelOverrides = KernelConfig | Mapping[str, Any]  # all steps, or those of them that somebody chose


def choose_kernels(
    dtype: str, choice: KernelOverrides, *, platform: str | None = None, shared_pages: bool = False,
    quantization: WeightQuantization | None = None,
) -> KernelConfig:  # fmt: skip
    """The kernels chosen, and for steps that nobody chose what is fastest on a platform: this one, where none is named.

    shared_pages: whether ranks hold parts of every page, which the loop alone can read. quantization: of the model's
    matrices, which native kernels do not read.

    Compiles nothing.
    That is native on a CPU with a C++ compiler (a warning is logged where there is none), and XLA's form otherwise. On
    a CPU XLA's products want every layer's weights by themselves: unroll.
    Raises: ConfigError for a step or a kernel that does not exist, or one that was chosen and cannot run here.
    """
    named = dict(vars(choice) if isinstance(choice, KernelConfig) else choice)
    for name in named:
        if name not in OPS:
            raise ConfigError(f"kernels has {name!r}; the ops are {', '.join(OPS)}")
    if shared_pages and named.setdefault("attention", "loop") != "loop":
        raise ConfigError(
            f"attention={named['attention']} reads whole pages, this layout shares them out over a context: use loop"
        )
    if quantization is not None:
        _choose_for_quantized(named, quantization, dtype)
    for name, backend in vars(KernelConfig(**named)).items():
        if backend == "native":
            native.check(dtype, option=name)
    platform = platform or jax.default_backend()
    unnamed = [] if isinstance(choice, KernelConfig) else [name for name in NATIVE_OPS if name not in named]
    if platform == "cpu" and unnamed and dtype in native.DTYPES:
        try:
            native.check(dtype, option=unnamed[0])
            named |= dict.fromkeys(unnamed, "native")
        except ConfigError as error:
            _log.warning(_SLOWER, error)
    if platform == "cpu" and named.get("linear") != "native":
        named.setdefault("layers", "unroll")
    return KernelConfig(**named)


def _choose_for_quantized(named: dict[str, Any], quantization: WeightQuantization, dtype: str) -> None:
    """Leave the native kernels to plain weights. Other products that linear runs may be native where these are not."""
    quantized = {
        "grouped": quantization.holds("moe/experts/"),
        "linear": quantization.holds("attention/", "mlp/", "moe/shared/"),
    }
    for op in (op for op, some in quantized.items() if some):
        if named.get(op) == "native":
            raise ConfigError(
                f"{op}=native reads plain weights, those of this model are {quantization.format.dtype}: leave it "
                f"out, or give weights_dtype (--weights-dtype) {dtype}"
            )
    if quantized["grouped"]:
        named.setdefault("grouped", "blocks")


def prepare_kernels(dtype: str, choice: KernelOverrides, kernels: KernelConfig) -> KernelConfig:
    """The kernels, ready for arrays of dtype; XLA's in place of native ones that nobody chose and that do not compile
    here (a warning is logged), whose products want layers by themselves.

    Raises: ConfigError where a kernel that was chosen cannot run.
    """
    unnamed = _unnamed(choice)
    try:
        kernels.prepare(dtype)
    except ConfigError as error:
        plain = KernelConfig()
        kernels = replace(kernels, **{name: getattr(plain, name) for name in unnamed})
        if isinstance(choice, Mapping) and "layers" not in choice and kernels.linear == "xla":
            kernels = replace(kernels, layers="unroll")
        kernels.prepare(dtype)
        _log.warning(_SLOWER, error)
    return kernels


def _unnamed(choice: KernelOverrides) -> list[str]:
    """Steps with a native kernel that nobody chose one for."""
    return [] if isinstance(choice, KernelConfig) else [name for name in NATIVE_OPS if name not in choice]

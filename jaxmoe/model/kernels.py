"""Selection of the backend of each op. All backends of an op compute the same result."""

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
    """Select a backend for each op.

    The backends are described in dispatch.py, grouped.py, linear.py, paged.py, pointwise.py and sample.py of ops/.
    layers: "scan" runs identical layers in a loop that is compiled once, "unroll" compiles each layer separately
    (parallel/stages.py).
    Raises: ConfigError if an op has no backend of that name.
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
        """Prepare the backends that run outside XLA, for arrays of dtype.

        Raises: ConfigError if one cannot run here.
        """
        for name in NATIVE_OPS:
            if getattr(self, name) == "native":
                native.prepare(dtype, option=name)


KernelOverrides = KernelConfig | Mapping[str, Any]  # all ops, or only the ops chosen by the caller


def choose_kernels(
    dtype: str, choice: KernelOverrides, *, platform: str | None = None, shared_pages: bool = False,
    quantization: WeightQuantization | None = None,
) -> KernelConfig:  # fmt: skip
    """Return the chosen backends, and the fastest ones of the platform for the remaining ops. Compiles nothing.

    Default: native kernels on a CPU with a C++ compiler, XLA otherwise. A warning is logged on a CPU without a
    compiler. XLA matmuls on a CPU need every layer's weights in separate arrays, so the default of layers is then
    "unroll".

    platform: JAX's default backend if not given. shared_pages: whether context-parallel ranks hold parts of every page,
    which only attention="loop" can read. quantization: quantization of the model's matrices, which native kernels
    cannot read.
    Raises: ConfigError if an op or a backend does not exist, or if a chosen backend cannot run here.
    """
    named = dict(vars(choice) if isinstance(choice, KernelConfig) else choice)
    for name in named:
        if name not in OPS:
            raise ConfigError(f"kernels has unknown op {name!r}; the ops are {', '.join(OPS)}")
    if shared_pages and named.setdefault("attention", "loop") != "loop":
        raise ConfigError(
            f"attention={named['attention']} reads whole pages, but this layout shards them over context: use loop"
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
    """Set the backends of ops on quantized weights, which native kernels cannot read.

    linear may still run its plain matrices natively by default.
    Raises: ConfigError if a native kernel was chosen for quantized weights.
    """
    quantized = {
        "grouped": quantization.holds("moe/experts/"),
        "linear": quantization.holds("attention/", "mlp/", "moe/shared/"),
    }
    for op in (op for op, some in quantized.items() if some):
        if named.get(op) == "native":
            raise ConfigError(
                f"{op}=native reads plain weights, but this model's weights are {quantization.format.dtype}: "
                f"leave it out, or set weights_dtype (--weights-dtype) to {dtype}"
            )
    if quantized["grouped"]:
        named.setdefault("grouped", "blocks")


def prepare_kernels(dtype: str, choice: KernelOverrides, kernels: KernelConfig) -> KernelConfig:
    """Return the kernels, prepared for arrays of dtype.

    If native kernels that the caller did not choose fail to compile, XLA replaces them and a warning is logged. Then
    layers defaults to "unroll" for XLA matmuls.
    Raises: ConfigError if a chosen kernel cannot run.
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
    """Return the ops that have a native kernel and no backend chosen by the caller."""
    return [] if isinstance(choice, KernelConfig) else [name for name in NATIVE_OPS if name not in choice]

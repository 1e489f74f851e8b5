"""Selection of the backend of each op. All backends of an op compute the same result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DispatchBackend
from jaxmoe.ops.grouped_matmul import GroupedBackend
from jaxmoe.ops.linear import LinearBackend
from jaxmoe.ops.paged_attention import PagedBackend
from jaxmoe.ops.pointwise import PointwiseBackend
from jaxmoe.ops.registry import REGISTRY
from jaxmoe.ops.sampling import SamplingBackend
from jaxmoe.parallel.stages import LAYERS_MODES, LayersMode
from jaxmoe.quantization.formats import WeightQuantization

OPS = (*REGISTRY, "layers")
NATIVE_OPS = tuple(op for op, backends in REGISTRY.items() if any(each.is_native for each in backends.values()))
_log = logging.getLogger("jaxmoe")
_SLOWER = "jaxmoe: generation runs slower than it could: %s"


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Select a backend for each op.

    ops/registry.py lists the backends; backends.py in the folder of each op describes them.
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
        for name in OPS:
            value, backends = getattr(self, name), LAYERS_MODES if name == "layers" else tuple(REGISTRY[name])
            if value not in backends:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(backends)}")

    def prepare(self, dtype: str) -> None:
        """Prepare the backends that run outside XLA, for arrays of dtype.

        Raises: ConfigError if one cannot run here.
        """
        for op, backends in REGISTRY.items():
            backends[getattr(self, op)].prepare(dtype)


KernelOverrides = KernelConfig | Mapping[str, Any]  # all ops, or only the ops chosen by the caller


def named_backends(choice: KernelOverrides) -> dict[str, Any]:
    """Return the backend of each op that the caller chose. Raises: ConfigError if an op does not exist."""
    if not isinstance(choice, KernelConfig | Mapping):
        raise ConfigError(f"kernels={choice!r:.60} must be a KernelConfig, or a mapping from op to backend")
    named = dict(vars(choice) if isinstance(choice, KernelConfig) else choice)
    for name in named:
        if name not in OPS:
            raise ConfigError(f"kernels has unknown op {name!r}; the ops are {', '.join(OPS)}")
    return named


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
    named = named_backends(choice)
    formats = {} if quantization is None else _quantized_ops(quantization)
    for name, backend in vars(KernelConfig(**named)).items():
        if name in named and name in REGISTRY:
            reason = REGISTRY[name][backend].unsupported_reason(
                dtype=dtype, quantized=formats.get(name), page_shards=shared_pages
            )
            if reason is not None:
                raise ConfigError(reason)
    platform = platform or jax.default_backend()
    if shared_pages:
        named.setdefault("attention", "loop")
    if "grouped" in formats:
        named.setdefault("grouped", "blocks")
    unnamed = [] if isinstance(choice, KernelConfig) else [name for name in NATIVE_OPS if name not in named]
    if platform == "cpu" and unnamed and dtype in native.DTYPES:
        reason = REGISTRY[unnamed[0]]["native"].unsupported_reason(dtype=dtype)
        if reason is None:
            named |= dict.fromkeys(unnamed, "native")
        else:
            _log.warning(_SLOWER, reason)
    if platform == "cpu" and named.get("linear") != "native":
        named.setdefault("layers", "unroll")
    return KernelConfig(**named)


def _quantized_ops(quantization: WeightQuantization) -> dict[str, str]:
    """Return the ops that read quantized weights, with the format. linear reads its other matrices by any backend."""
    reads = {
        "grouped": quantization.holds("moe/experts/"),
        "linear": quantization.holds("attention/", "mlp/", "moe/shared/"),
    }
    return {op: quantization.format.dtype for op, some in reads.items() if some}


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

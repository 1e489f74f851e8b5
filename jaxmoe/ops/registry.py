"""The kernel registry: the backends of every op, what each can read, and why one cannot run.

A kernel for another platform is one more entry here, and a branch in its op. All backends of an op compute the same
result; the tests of an op run over its entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.ops.dispatch import DISPATCH_BACKENDS
from jaxmoe.ops.grouped import GROUPED_BACKENDS
from jaxmoe.ops.linear import LINEAR_BACKENDS
from jaxmoe.ops.paged import PAGED_BACKENDS
from jaxmoe.ops.pointwise import POINTWISE_BACKENDS
from jaxmoe.ops.sample import SAMPLING_BACKENDS


@dataclass(frozen=True, kw_only=True)
class KernelBackend:
    """Describe one backend of an op.

    is_native: a C++ kernel for the CPU, compiled on first use. is_opaque: XLA cannot shard it, so that it is called on
    the arrays of each rank. reads_quantized: it reads quantized weights. reads_page_shards: it reads pages of which
    each context-parallel rank holds a part.
    """

    op: str
    name: str
    is_native: bool = False
    is_opaque: bool = False
    reads_quantized: bool = True
    reads_page_shards: bool = True

    def unsupported_reason(self, *, dtype: str, quantized: str | None = None, page_shards: bool = False) -> str | None:
        """Return why the backend cannot run here, with a remedy; None if it can. Compiles nothing.

        dtype: of activations. quantized: format of the weights that the op reads. page_shards: whether context-parallel
        ranks hold parts of every page.
        """
        if page_shards and not self.reads_page_shards:
            return f"{self.op}={self.name} reads whole pages, but this layout shards them over context: use loop"
        if quantized is not None and not self.reads_quantized:
            return (
                f"{self.op}={self.name} reads plain weights, but this model's weights are {quantized}: "
                f"leave it out, or set weights_dtype (--weights-dtype) to {dtype}"
            )
        if self.is_native:
            try:
                native.check(dtype, option=self.op)
            except ConfigError as error:
                return str(error)
        return None


def _entries(op: str, names: tuple[str, ...], **of_native: bool) -> dict[str, KernelBackend]:
    """Return the entries of an op. of_native: facts of its native backend."""
    facts = {"is_native": True, "is_opaque": True} | of_native
    return {name: KernelBackend(op=op, name=name, **(facts if name == "native" else {})) for name in names}


REGISTRY: Mapping[str, Mapping[str, KernelBackend]] = {
    "dispatch": _entries("dispatch", DISPATCH_BACKENDS),
    "grouped": _entries("grouped", GROUPED_BACKENDS, reads_quantized=False),
    "linear": _entries("linear", LINEAR_BACKENDS, reads_quantized=False),
    "attention": _entries("attention", PAGED_BACKENDS, reads_page_shards=False),
    "pointwise": _entries("pointwise", POINTWISE_BACKENDS),
    "sampling": _entries("sampling", SAMPLING_BACKENDS),
}


def is_opaque(op: str, backend: str) -> bool:
    """Return whether XLA cannot shard a backend of an op."""
    return REGISTRY[op][backend].is_opaque

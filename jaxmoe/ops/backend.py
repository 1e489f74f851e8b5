"""One entry of the kernel registry: a backend of an op, the arrays that it can read, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native
from jaxmoe.parallel.sharding import Dims, MeshPlacement


@dataclass(frozen=True, kw_only=True)
class KernelBackend:
    """Describe one backend of an op.

    op: name of the option that selects the backend. kernels: implementation of each function of the op. is_native: a
    C++ kernel for the CPU, compiled on first use. is_opaque: XLA cannot shard it, so that it is called on the arrays of
    each rank. reads_quantized: it reads quantized weights. reads_page_shards: it reads pages of which each
    context-parallel rank holds a part.
    """

    op: str
    name: str
    kernels: Mapping[str, Callable[..., Any]]
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

    def prepare(self, dtype: str) -> None:
        """Compile and load the backend for arrays of dtype, if it runs outside XLA.

        Raises: ConfigError if it cannot run here.
        """
        if self.is_native:
            native.prepare(dtype, option=self.op)

    def call_sharded(
        self, function: Callable[..., jax.Array], placement: MeshPlacement, *operands: tuple[jax.Array, Dims], out: Dims
    ) -> jax.Array:
        """Call a function of this backend on sharded arrays, each given with its logical dims.

        Whole arrays are passed if XLA can shard the kernel, otherwise the arrays of each rank. out: logical dims of the
        result.
        """
        if self.is_opaque:
            return placement.shard_map_local(function, *operands, out=out)
        return function(*(array for array, _ in operands))


def backends_by_name(*backends: KernelBackend) -> Mapping[str, KernelBackend]:
    """Return the backends of an op by their names, in the given order."""
    return {backend.name: backend for backend in backends}

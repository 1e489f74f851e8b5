"""Parameter declarations. Every parameter carries its logical dims and its pipeline view.

Sharding, loading and saving follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.ops.quantized_matmul import QuantizedArray, Weights
from jaxmoe.ops.stack import LayerIndex, layer_of
from jaxmoe.parallel.sharding import Dims, MeshPlacement, PipelineView
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.formats import BlockAlignment, QuantizationFormat, param_scale_shape

Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def normal(stddev: float) -> Init:
    """Return an initializer that draws from a normal distribution."""
    return jax.nn.initializers.normal(stddev)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initialize an array to ones (norms)."""
    del key
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initialize an array to zeros (biases)."""
    del key
    return jnp.zeros(shape, dtype)


def at_layer(param: nnx.Param, layer: LayerIndex) -> jax.Array:
    """Return the array of one layer of a stacked parameter."""
    return layer_of(param[...], layer)


class QuantizedParam(nnx.Module):
    """Hold a quantized matrix as two parameters with the same logical dims: numbers and scales
    (ops/quantized_matmul/array.py)."""

    def __init__(self, numbers: nnx.Param, scales: nnx.Param) -> None:
        self.numbers, self.scales = numbers, scales


Matrix = nnx.Param | QuantizedParam


def weights_of(param: Matrix) -> Weights:
    """Return the array of a parameter, or numbers and scales if it is quantized."""
    if isinstance(param, QuantizedParam):
        return QuantizedArray(param.numbers[...], param.scales[...])
    return param[...]


def dims_of(param: Matrix) -> Dims:
    """Return the logical dims of a parameter. Numbers and scales of a quantized one share them."""
    one = param.numbers if isinstance(param, QuantizedParam) else param
    return tuple(one.get_metadata()["dims"])


class QuantizedMatrices(NamedTuple):
    """Describe the quantized matrices of a block: their format, block alignment by path, and placement."""

    format: QuantizationFormat
    alignments: Mapping[str, BlockAlignment]
    placement: MeshPlacement


class ParamFactory:
    """Create the parameters of one model, with one dtype and random keys drawn in order."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        lead: Mapping[str, int] = MappingProxyType({}),
        view: PipelineView = "outside_pipeline",
        quantized: QuantizedMatrices | None = None,
    ) -> None:
        self._rngs, self._dtype, self._lead, self._view, self._quantized = rngs, dtype, lead, view, quantized

    def stacked(self, segment: LayerSegment, block: int, config: ModelConfig, placement: MeshPlacement) -> ParamFactory:
        """Return a factory for the parameters of one block of a segment, which stack its layers in a leading dim.

        placement: as the stacked parameters see it.
        """
        quantized = None
        if config.quantization is not None:
            quantized = QuantizedMatrices(
                config.quantization.format, config.quantization.of(segment.first + block), placement
            )
        view: PipelineView = "stacked" if segment.stages > 1 else "outside_pipeline"
        return ParamFactory(self._rngs, self._dtype, {"layer": segment.slots}, view, quantized)

    def __call__(self, init: Init, **dims: int) -> nnx.Param:
        """Create a parameter from its logical dims and sizes in order, such as width=64, ffn=256."""
        dims = {**self._lead, **dims}
        array = init(self._rngs.params(), tuple(dims.values()), self._dtype)
        return nnx.Param(array, dims=tuple(dims), view=self._view)

    def matrix(self, path: str, init: Init, *, lead: int = 0, over: int = 1, **dims: int) -> Matrix:
        """Create a matrix, which may be quantized.

        dims: `lead` dims over matrices, then `over` dims of the inputs, then the dims of the outputs. path: within the
        block.
        """
        if self._quantized is None or path not in self._quantized.alignments:
            return self(init, **dims)
        format, placement = self._quantized.format, self._quantized.placement
        shares = [size // placement.num_shards(dim) for dim, size in dims.items()]
        counts = param_scale_shape(
            list(dims.values()), shares, lead=lead, over=over, format=format, alignment=self._quantized.alignments[path]
        )
        packed = list(dims)[lead + over - 1]
        items = dims | {packed: dims[packed] // format.packing_factor}
        scales = dict(zip(dims, counts, strict=True))
        return QuantizedParam(*(
            ParamFactory(self._rngs, jnp.dtype(dtype), self._lead, self._view)(zeros, **sizes)
            for dtype, sizes in ((format.stored_dtype, items), (format.scale_dtype, scales))
        ))  # fmt: skip

    def exact(self, init: Init, **dims: int) -> nnx.Param:
        """Create a float32 parameter, regardless of the dtype of the others."""
        return ParamFactory(self._rngs, jnp.dtype(jnp.float32), self._lead, self._view)(init, **dims)

    def indices(self, **dims: int) -> nnx.Param:
        """Create an int32 parameter of zeros, which checkpoints do not contain."""
        dims = {**self._lead, **dims}
        return nnx.Param(jnp.zeros(tuple(dims.values()), jnp.int32), dims=tuple(dims), view=self._view)

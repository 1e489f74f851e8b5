"""Creation of declared parameters. Every parameter carries its logical dims, its part and its pipeline view.

Sharding, loading and saving follow from them. families/parameters.py declares the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.families.parameters import Initializer, ParameterDeclaration
from jaxmoe.ops.quantized_matmul import QuantizedArray, Weights
from jaxmoe.ops.stack import LayerIndex, layer_of
from jaxmoe.parallel.sharding import Dims, MeshPlacement, PipelineView
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.formats import BlockAlignment, QuantizationFormat, param_scale_shape

_STDDEV = 0.02  # of randomly initialized matrices


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
        stddev: float = _STDDEV,
    ) -> None:
        """Create a factory. lead: dims before those of every declaration. stddev: of normal initializers."""
        self._rngs, self._dtype, self._lead, self._view, self._quantized = rngs, dtype, lead, view, quantized
        self._stddev = stddev
        self._initializers: Mapping[Initializer, Callable[..., jax.Array]] = {
            "normal": jax.nn.initializers.normal(stddev),
            "ones": jax.nn.initializers.ones,
            "zeros": jax.nn.initializers.zeros,
        }

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
        return ParamFactory(self._rngs, self._dtype, {"layer": segment.slots}, view, quantized, self._stddev)

    def create(self, module: nnx.Module, declarations: Iterable[ParameterDeclaration], *, within: str = "") -> None:
        """Create parameters as attributes of a module or of its submodules, by their paths.

        within: path of the module in its block.
        """
        for declaration in declarations:
            *submodules, name = declaration.path.removeprefix(f"{within}/").split("/")
            setattr(reduce(getattr, submodules, module), name, self(declaration))

    def __call__(self, declaration: ParameterDeclaration) -> Matrix:
        """Create a parameter, which may be quantized."""
        if self._quantized is None or declaration.path not in self._quantized.alignments:
            dtype = self._dtype if declaration.dtype is None else declaration.dtype
            return self._param(declaration, declaration.dims, dtype, declaration.initializer)
        format, placement = self._quantized.format, self._quantized.placement
        dims, alignment = declaration.dims, self._quantized.alignments[declaration.path]
        shares = [size // placement.num_shards(dim) for dim, size in dims.items()]
        counts = param_scale_shape(
            list(dims.values()), shares, lead=declaration.lead, over=declaration.over, format=format,
            alignment=alignment,
        )  # fmt: skip
        packed = list(dims)[declaration.lead + declaration.over - 1]
        items = {**dims, packed: dims[packed] // format.packing_factor}
        scales = dict(zip(dims, counts, strict=True))
        return QuantizedParam(
            self._param(declaration, items, format.stored_dtype, "zeros"),
            self._param(declaration, scales, format.scale_dtype, "zeros"),
        )

    def _param(
        self,
        declaration: ParameterDeclaration,
        dims: Mapping[str, int],
        dtype: str | jnp.dtype,
        initializer: Initializer,
    ) -> nnx.Param:
        dims = {**self._lead, **dims}
        array = self._initializers[initializer](self._rngs.params(), tuple(dims.values()), jnp.dtype(dtype))
        return nnx.Param(array, dims=tuple(dims), view=self._view, part=declaration.part)

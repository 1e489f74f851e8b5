"""Compute the shards and bytes of declared parameters on a mesh, without building the abstract model.

A test compares every byte with the abstract model, for every family and layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from jaxmoe.families.parameters import ParameterDeclaration
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.formats import BlockAlignment, QuantizationFormat, param_scale_shape

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}


class ShardedDims(Protocol):
    """Return the number of shards of a logical dim, as MeshPlacement and ShardCounts do."""

    def num_shards(self, dim: str, /) -> int:
        """Return the number of shards of a logical dim."""
        ...


@dataclass(frozen=True)
class ShardCounts:
    """Hold the number of shards of the logical dims in a block that a layout may split; all others have one shard."""

    kv_head: int
    ffn: int
    moe_expert: int
    moe_ffn: int

    @classmethod
    def of(cls, placement: MeshPlacement) -> ShardCounts:
        """Return the shard counts of a placement."""
        return cls(
            placement.num_shards("kv_head"),
            placement.num_shards("ffn"),
            placement.num_shards("moe_expert"),
            placement.num_shards("moe_ffn"),
        )

    def num_shards(self, dim: str, /) -> int:
        """Return the number of shards of a logical dim."""
        return getattr(self, dim, 1)


def shard_shape(declaration: ParameterDeclaration, placement: ShardedDims) -> list[int]:
    """Return the shape of one layer's shard of a parameter on one device."""
    return [size // placement.num_shards(dim) for dim, size in declaration.dims.items()]


def device_bytes(
    declaration: ParameterDeclaration,
    placement: ShardedDims,
    *,
    itemsize: int,
    format: QuantizationFormat | None = None,
    alignment: BlockAlignment | None = None,
) -> int:
    """Return the bytes of one layer's parameter on one device.

    itemsize: of the model's dtype. format, alignment: given if the parameter is quantized.
    """
    shard, dims = shard_shape(declaration, placement), declaration.dims
    if format is None or alignment is None:
        return math.prod(shard) * (itemsize if declaration.dtype is None else itemsize_of(declaration.dtype))
    counts = param_scale_shape(
        list(dims.values()), shard, lead=declaration.lead, over=declaration.over, format=format, alignment=alignment
    )
    scales = math.prod(count // placement.num_shards(dim) for count, dim in zip(counts, dims, strict=True))
    return math.prod(shard) // format.packing_factor + scales * (1 if format.scale_dtype == "uint8" else 4)


def itemsize_of(dtype: str) -> int:
    """Return the bytes of one element of an unquantized dtype."""
    return _ITEMSIZES[dtype]


def num_layer_slots(part: LayerSegment) -> int:
    """Return the number of layer slots on a device for one block of a segment."""
    return part.slots // part.stages

"""Compute the memory of a device: weights by part, KV cache bytes per token, and temporary buffers of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import cast

from jax.sharding import Mesh

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import ParameterDeclaration, Part, block_parameters, outer_parameters
from jaxmoe.parallel.mesh import PlannedMesh
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes, segment_sizes
from jaxmoe.parallel.stages import LayerSegment, layer_segments
from jaxmoe.planner.parameters import ShardCounts, device_bytes, itemsize_of, num_layer_slots, shard_shape

# Bytes of a cached element, and of the scale per head and token, by KV cache dtype.
KV_ITEMSIZES: Mapping[str, tuple[int, int]] = {
    "float32": (4, 0), "bfloat16": (2, 0), "float16": (2, 0), "fp8": (1, 4), "int8": (1, 4),
}  # fmt: skip


@dataclass(frozen=True)
class DeviceLayers:
    """Describe layers of one kind as one device holds them.

    num_slots: layer slots on the device. num_layers: layers of the model, over all pipeline stages.
    """

    layer: int
    num_slots: int
    num_layers: int
    sizes: ArraySizes
    placement: MeshPlacement
    shards: ShardCounts
    params: tuple[tuple[ParameterDeclaration, int], ...]  # with the bytes of one layer on one device

    def bytes_of(self, *parts: Part) -> int:
        """Return the bytes of parts of one layer on one device."""
        return sum(size for param, size in self.params if param.part in parts)


class DeviceMemory:
    """Compute the memory that a model needs on every device of a placement."""

    def __init__(self, config: ModelConfig, placement: MeshPlacement, *, kv_dtype: str | None = None) -> None:
        """Compute the parameters on a device.

        config: its dtype is the dtype of activations and unquantized weights. kv_dtype: a key of KV_ITEMSIZES; by
        default the config's dtype. Raises: ConfigError if the pipeline has more stages than layers.
        """
        self.config, self.placement = config, placement
        self.itemsize = itemsize_of(config.dtype)
        self.kv_dtype = kv_dtype or config.dtype
        self._known: dict[
            tuple[object, ...], tuple[tuple[ParameterDeclaration, int], ...]
        ] = {}  # by kind of layer and view
        self.segments = layer_segments(
            config, "scan", stages=placement.num_stages, virtual_stages=placement.virtual_stages
        )
        self.sizes = segment_sizes(config, placement, self.segments)
        self.blocks = [
            self._block(segment, block, sizes)
            for segment, sizes in zip(self.segments, self.sizes, strict=True)
            for block in range(segment.period)
        ]
        outside = placement.with_view("outside_pipeline")
        self.outer = tuple(
            (param, device_bytes(param, outside, itemsize=self.itemsize))
            for param in outer_parameters(config, array_sizes(config, outside))
        )

    def _block(self, segment: LayerSegment, block: int, sizes: ArraySizes) -> DeviceLayers:
        config, placement, layer = self.config, self.placement.for_layers(segment), segment.first + block
        like = (config.kind(layer), placement.view)
        shards = ShardCounts.of(placement)
        if like not in self._known:
            maps_experts = self.placement.redundant_experts is not None
            self._known[like] = _params(config, layer, sizes, shards, self.itemsize, maps_experts)
        return DeviceLayers(
            layer, num_layer_slots(segment), segment.repeats, sizes, placement, shards, self._known[like]
        )

    @cached_property
    def weights_by_part(self) -> dict[Part, int]:
        """Return the weight bytes on one device by part."""
        num_bytes: Counter[Part] = Counter()
        for param, size in self.outer:
            num_bytes[param.part] += size
        for block in self.blocks:
            for param, size in block.params:
                num_bytes[param.part] += size * block.num_slots
        return dict(num_bytes)

    @cached_property
    def weight_bytes(self) -> int:
        """Return the weight bytes on one device."""
        return sum(self.weights_by_part.values())

    @cached_property
    def unpadded_bytes(self) -> float:
        """Return the weight bytes per device without padding and replication."""
        one = PlannedMesh({}, self.placement.platform)
        whole = DeviceMemory(
            self.config, replace(self.placement, mesh=cast("Mesh", one), virtual_stages=1, redundant_experts=None)
        )
        return whole.weight_bytes / math.prod(self.placement.mesh.shape.values())

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """Return the KV cache bytes per token on one device, averaged over context-parallel ranks."""
        return sum(self.kv_bytes(block) * block.num_slots for block in self.blocks) / self.placement.num_shards(
            "page_token"
        )

    @cached_property
    def _widest(self) -> int:
        return max(map(_width, self.blocks))

    def kv_bytes(self, block: DeviceLayers) -> int:
        """Return the KV cache bytes of one token and layer, on a device that holds the token."""
        item, scale = KV_ITEMSIZES[self.kv_dtype]
        slots = block.sizes.kv_slots // block.placement.num_shards("kv_head")
        return slots * self.config.cache_spec(block.layer).bytes_per_head(item, scale)

    def step_bytes(self, num_tokens: int, num_sampled: int) -> float:
        """Return the estimated temporary bytes of a step, the sum of step_parts."""
        return sum(self.step_parts(num_tokens, num_sampled).values())

    def step_parts(self, num_tokens: int, num_sampled: int) -> dict[str, float]:
        """Estimate the temporary bytes of a step by part: activations of the widest layer, dispatch buffers, logits.

        num_tokens, num_sampled: tokens and rows of logits of one rank. Logits are float32. `jaxmoe compile` reports the
        compiler's own figures.
        """
        config, moe = self.config, self.config.moe
        outside = self.placement.with_view("outside_pipeline")
        wide = 2 * self._widest
        rows = num_tokens / self.placement.num_shards("page_token")
        parts = {"activations": rows * (4 * config.hidden_size + wide) * self.itemsize}
        if moe is not None:
            ranks = self.placement.size(self.placement.ep_exchange_axes("token"))
            parts["activations"] += rows * moe.num_experts_per_tok * moe.intermediate_size * 3 * self.itemsize
            if ranks > 1:
                parts["dispatch_buffers"] = 2 * ranks * rows * config.hidden_size * self.itemsize
        vocab = self.outer[0][0].dims["vocab"]
        return parts | {"logits": num_sampled * vocab * 4 * (1 + 1 / outside.num_shards("vocab"))}


@lru_cache(maxsize=4096)
def _params(
    config: ModelConfig, layer: int, sizes: ArraySizes, shards: ShardCounts, itemsize: int, maps_experts: bool
) -> tuple[tuple[ParameterDeclaration, int], ...]:  # fmt: skip
    """Return a layer's parameters with their bytes on a device, cached since many placements shard a layer equally."""
    kept = config.quantization.of(layer) if config.quantization else {}
    format = config.quantization.format if config.quantization else None
    return tuple(
        (one, device_bytes(one, shards, itemsize=itemsize, format=format, alignment=kept.get(one.path)))
        for one in block_parameters(config, sizes, layer, maps_experts=maps_experts)
    )


def _width(block: DeviceLayers) -> int:
    """Return the largest input or output width of a layer's matrices on a device."""
    widest = 0
    for param, _ in block.params:
        if param.over and not param.lead:
            share = shard_shape(param, block.shards)
            widest = max(widest, math.prod(share[: param.over]), math.prod(share[param.over :]))
    return widest

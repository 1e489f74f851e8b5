"""List the parameters of a model on a mesh from its config alone, without building the abstract model.

A test compares every byte with the abstract model, for every family and layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.planner.sizes import Part
from jaxmoe.quantization.formats import BlockAlignment, QuantizationFormat, param_scale_shape

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


@dataclass(frozen=True, kw_only=True)
class ParameterShape:
    """Describe one parameter of a block, or outside all blocks.

    path: path within its block. dims: padded sizes of its logical dims, in order. lead: number of leading batch dims of
    a stack of matrices. over: number of input dims after them; 0 if the parameter is not a matrix. itemsize: bytes of
    one element; None for the model's dtype.
    """

    path: str
    part: Part
    dims: Mapping[str, int]
    lead: int = 0
    over: int = 0
    itemsize: int | None = None

    def share(self, placement: ShardedDims) -> list[int]:
        """Return the shape of the shard on one device."""
        return [size // placement.num_shards(dim) for dim, size in self.dims.items()]

    def device_bytes(
        self,
        placement: ShardedDims,
        *,
        itemsize: int,
        format: QuantizationFormat | None,
        alignment: BlockAlignment | None,
    ) -> int:
        """Return the bytes of one layer's parameter on one device. format, alignment: given if it is quantized."""
        share = self.share(placement)
        if format is None or alignment is None:
            return math.prod(share) * (self.itemsize or itemsize)
        counts = param_scale_shape(
            list(self.dims.values()), share, lead=self.lead, over=self.over, format=format, alignment=alignment
        )  # fmt: skip
        scales = math.prod(count // placement.num_shards(dim) for count, dim in zip(counts, self.dims, strict=True))
        return math.prod(share) // format.packing_factor + scales * (1 if format.scale_dtype == "uint8" else 4)


def itemsize_of(dtype: str) -> int:
    """Return the bytes of one element of an unquantized dtype."""
    return _ITEMSIZES[dtype]


def outer_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterShape]:
    """Yield parameters outside the layer stack: embedding, final norm, LM head."""
    yield ParameterShape(path="embed", part="embedding", dims={"vocab": sizes.vocab, "width": config.hidden_size})
    yield ParameterShape(path="final_norm", part="norms", dims={"width": config.hidden_size})
    if not config.tie_word_embeddings:
        yield ParameterShape(path="head", part="head", dims={"width": config.hidden_size, "vocab": sizes.vocab}, over=1)


def block_parameters(
    config: ModelConfig, sizes: ArraySizes, layer: int, *, maps_experts: bool = False
) -> Iterator[ParameterShape]:
    """Yield the parameters of one layer. maps_experts: whether it has a map of physical experts."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield ParameterShape(path=name, part="norms", dims={"width": config.hidden_size})
    yield from (_grouped if config.mla is None else _latent)(config, sizes)
    if config.moe_layers[layer]:
        yield from _experts(config, sizes, maps_experts=maps_experts)
    else:
        yield from _dense(config, sizes.ffn, "mlp", "dense_mlp")
        if config.mlp_bias:
            for name in ("gate", "up"):
                yield ParameterShape(path=f"mlp/{name}_bias", part="dense_mlp", dims={"ffn": sizes.ffn})
            yield ParameterShape(path="mlp/down_bias", part="dense_mlp", dims={"width": config.hidden_size})


def _grouped(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterShape]:
    width, head = config.hidden_size, config.head_dim
    query = {"kv_head": sizes.kv_slots, "head_slot": sizes.group_slots, "head_dim": head}
    all_heads = query | {"head_slot": sizes.group_slots + 2}
    yield ParameterShape(path="attention/qkv", part="attention", dims={"width": width, **all_heads}, over=1)
    yield ParameterShape(path="attention/out", part="attention", dims={**query, "width": width}, over=3)
    if config.qkv_bias:
        yield ParameterShape(path="attention/qkv_bias", part="attention", dims=all_heads)
    if config.out_bias:
        yield ParameterShape(path="attention/out_bias", part="attention", dims={"width": width})
    if config.qk_norm == "head":
        for name in ("q_norm", "k_norm"):
            yield ParameterShape(path=f"attention/{name}", part="norms", dims={"head_dim": head})
    if config.qk_norm == "full":
        yield ParameterShape(path="attention/q_norm", part="norms", dims=query)
        yield ParameterShape(path="attention/k_norm", part="norms", dims={"kv_head": sizes.kv_slots, "head_dim": head})
    if config.sinks:
        yield ParameterShape(
            path="attention/sinks", part="attention", dims={name: query[name] for name in list(query)[:2]}
        )


def _latent(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterShape]:
    mla, width = config.mla, config.hidden_size
    assert mla is not None
    heads = {"kv_head": sizes.kv_slots, "head_slot": sizes.group_slots}
    rank, into = mla.kv_lora_rank, {"width": width}

    def attention(name: str, over: int = 0, **dims: int) -> ParameterShape:
        return ParameterShape(path=f"attention/{name}", part="attention", dims=dims, over=over)

    yield attention("kv_down", over=1, width=width, latent=mla.cached_dim)
    yield ParameterShape(path="attention/kv_norm", part="norms", dims={"latent": rank})
    if mla.q_lora_rank is not None:
        yield attention("q_down", over=1, width=width, latent=mla.q_lora_rank)
        yield ParameterShape(path="attention/q_norm", part="norms", dims={"latent": mla.q_lora_rank})
        into = {"latent": mla.q_lora_rank}
    yield attention("q", over=1, **into, **heads, head_dim=config.head_dim)
    yield attention("key_up", **heads, head_dim=mla.qk_nope_head_dim, latent=rank)
    yield attention("value_up", **heads, latent=rank, head_dim=mla.v_head_dim)
    yield attention("out", over=3, **heads, head_dim=mla.v_head_dim, width=width)
    if config.out_bias:
        yield attention("out_bias", width=width)


def _dense(config: ModelConfig, ffn: int, path: str, part: Part) -> Iterator[ParameterShape]:
    width = config.hidden_size
    for name in ("gate", "up"):
        yield ParameterShape(path=f"{path}/{name}", part=part, dims={"width": width, "ffn": ffn}, over=1)
    yield ParameterShape(path=f"{path}/down", part=part, dims={"ffn": ffn, "width": width}, over=1)


def _experts(config: ModelConfig, sizes: ArraySizes, *, maps_experts: bool) -> Iterator[ParameterShape]:
    moe, width = config.moe, config.hidden_size
    assert moe is not None
    router = {"router_expert": moe.num_experts}
    experts = {"moe_expert": sizes.moe_experts}
    yield ParameterShape(path="moe/router", part="router", dims={"width": width, **router}, over=1)
    if moe.router_bias:
        yield ParameterShape(path="moe/router_bias", part="router", dims=router)
    if moe.selection_bias:
        yield ParameterShape(path="moe/selection_bias", part="router", dims=router, itemsize=4)
    up = {**experts, "gate_or_up": 2, "width": width, "moe_ffn": sizes.moe_ffn}
    down = {**experts, "moe_ffn": sizes.moe_ffn, "width": width}
    yield ParameterShape(path="moe/experts/gate_up", part="experts", dims=up, lead=2, over=1)
    yield ParameterShape(path="moe/experts/down", part="experts", dims=down, lead=1, over=1)
    if moe.biases:
        bias = {**experts, "gate_or_up": 2, "moe_ffn": sizes.moe_ffn}
        yield ParameterShape(path="moe/experts/gate_up_bias", part="experts", dims=bias)
        yield ParameterShape(path="moe/down_bias", part="experts", dims={**router, "width": width})
    if maps_experts:
        yield ParameterShape(
            path="moe/physical_expert_map",
            part="router",
            dims={"expert_map": 3, "physical_expert": sizes.moe_experts},
            itemsize=4,
        )
    if moe.shared_intermediate_size:
        yield from _dense(config, sizes.shared_ffn, "moe/shared", "shared_expert")
    if moe.shared_gate:
        yield ParameterShape(
            path="moe/shared_gate", part="shared_expert", dims={"width": width, "unsharded": 1}, over=1
        )


def num_layer_slots(part: LayerSegment) -> int:
    """Return the number of layer slots on a device for one block of a segment."""
    return part.slots // part.stages

"""Count the parameters of a model by part, and its KV cache elements per token, from its config alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families import FAMILIES, WeightSlice, weight_slices
from jaxmoe.families.parameters import ParameterDeclaration, Part, checkpoint_parameters, outer_parameters
from jaxmoe.families.quantization_reader import is_quantized, tells_layers
from jaxmoe.parallel.stages import layer_segments, locate_layer
from jaxmoe.planner.parameters import itemsize_of
from jaxmoe.quantization.layout import oriented

_QUANTIZED: tuple[Part, ...] = ("attention", "dense_mlp", "experts", "shared_expert")
PARTS: tuple[Part, ...] = (
    "embedding", "attention", "dense_mlp", "router", "experts", "shared_expert", "norms", "head",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointTensor:
    """Describe one tensor of a published checkpoint.

    shape: of the unquantized values. part: the part of the model it belongs to. num_bytes: size in the checkpoint's
    files, including scales. layer: index of its layer, None outside the layers.
    """

    key: str
    shape: tuple[int, ...]
    part: Part
    num_bytes: int
    layer: int | None = None

    @property
    def num_params(self) -> int:
        """Return the number of parameters."""
        return math.prod(self.shape)


def checkpoint_tensors(config: ModelConfig, *, layers: Collection[int] | None = None) -> Iterator[CheckpointTensor]:
    """Yield every tensor of a checkpoint once, in layer order.

    layers: restrict to these layers and the tensors outside all layers.
    """
    config = replace(config, quantization=None)
    segments = layer_segments(config, "unroll")  # one segment per layer
    sizes = [ArraySizes.unpadded(config)] * len(segments)
    declared: dict[str, tuple[int | None, ParameterDeclaration]] = {
        one.path: (None, one) for one in outer_parameters(config, sizes[0])
    }
    for number in range(config.num_hidden_layers):
        if layers is None or number in layers:
            block = locate_layer(number, segments).path
            declared |= {f"{block}/{one.path}": (number, one) for one in checkpoint_parameters(config, number)}
    seen: set[str] = set()
    for weight_slice in weight_slices(config, sizes, FAMILIES[config.family].names, segments, layers=layers):
        if weight_slice.key not in seen:
            seen.add(weight_slice.key)
            layer, declaration = declared[weight_slice.path]
            yield CheckpointTensor(
                key=weight_slice.key, shape=weight_slice.key_shape, part=declaration.part,
                num_bytes=_num_bytes(weight_slice, declaration, config), layer=layer,
            )  # fmt: skip


def _num_bytes(weight_slice: WeightSlice, declaration: ParameterDeclaration, config: ModelConfig) -> int:
    count, quant_config = math.prod(weight_slice.key_shape), config.checkpoint_quantization
    if declaration.part not in _QUANTIZED or quant_config is None or not is_quantized(weight_slice, quant_config):
        return count * itemsize_of(declaration.dtype or config.dtype)
    form, (*lead, outputs, inputs) = quant_config.format, oriented(weight_slice).key_shape
    blocks = math.prod(lead) * -(-outputs // form.outputs) * -(-inputs // (form.inputs or inputs))
    return count // form.packing_factor + blocks * (1 if form.scale_dtype == "uint8" else 4)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Hold the parameter counts of a model.

    by_part: parameters by part. num_bytes: bytes in the checkpoint's files by part. total: all parameters. active:
    parameters that compute one token, including embedding and LM head. active_without_embedding: the same without the
    embedding, as publishers often count, unless the head is tied to it.
    """

    by_part: dict[Part, int]
    num_bytes: dict[Part, int]
    total: int
    active: int
    active_without_embedding: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model."""
    by_part: Counter[Part] = Counter()
    num_bytes: Counter[Part] = Counter()
    kinds = [config.kind(layer) for layer in range(config.num_hidden_layers)]
    counts = Counter(kinds)
    alike = config.checkpoint_quantization is None or not tells_layers(config.checkpoint_quantization)
    for tensor in checkpoint_tensors(config, layers={kinds.index(kind) for kind in kinds} if alike else None):
        times = counts[kinds[tensor.layer]] if alike and tensor.layer is not None else 1
        by_part[tensor.part] += times * tensor.num_params
        num_bytes[tensor.part] += times * tensor.num_bytes
    total, idle, moe = sum(by_part.values()), 0, config.moe
    if moe is not None:
        idle = by_part["experts"] // moe.num_experts * (moe.num_experts - moe.num_experts_per_tok)
    there = [part for part in PARTS if by_part[part]]
    return ParameterCounts(
        by_part={part: by_part[part] for part in there}, num_bytes={part: num_bytes[part] for part in there},
        total=total, active=total - idle,
        active_without_embedding=total - idle - (0 if config.tie_word_embeddings else by_part["embedding"]),
    )  # fmt: skip


def behind_windows(
    config: ModelConfig, num_tokens: int, *, chunk_tokens: int, num_bytes: float
) -> dict[str, int | bool] | None:
    """Describe how pages outside the attention windows of a request of num_tokens are used; None without windows.

    num_bytes: bytes of one token's keys and values in one layer. Keys of the result: layers: number of layers with a
    sliding window or attention chunk. freed: whether every layer has one, so that pages outside all windows are freed
    for other requests. If not, pages hold all tokens for all layers, and kept_bytes of them are outside the layers'
    windows. held_tokens: the most tokens of the request in the cache at once.
    """
    spans = [cache_spec.span for cache_spec in config.cache_specs]
    limited = [span for span in spans if span is not None]
    if not limited:
        return None
    freed = any(config.visible_span)
    kept = 0 if freed else sum(max(0, num_tokens - span) for span in limited)
    return {
        "tokens": num_tokens, "layers": len(limited), "of_layers": len(spans), "freed": freed,
        "held_tokens": config.cached_tokens(num_tokens, chunk_tokens), "kept_bytes": round(kept * num_bytes),
    }  # fmt: skip


def behind_words(facts: Mapping[str, Any]) -> str:
    """Format the result of behind_windows as a sentence."""
    if facts["freed"]:
        return (
            f"Pages outside attention windows are freed: a request of {facts['tokens']:,} tokens holds at most "
            f"{facts['held_tokens']:,} at once."
        )
    return (
        f"Pages outside attention windows of {facts['layers']} of {facts['of_layers']} layers are not freed: "
        f"{facts['kept_bytes'] / 2**20:,.1f} MiB for a request of {facts['tokens']:,} tokens."
    )


def kv_numbers(config: ModelConfig) -> int:
    """Return the KV cache elements per token, over all layers, without replicated heads."""
    return config.num_key_value_heads * sum(cache_spec.numbers_per_head for cache_spec in config.cache_specs)

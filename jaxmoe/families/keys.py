"""Table of the checkpoint tensors that fill each parameter, used by loading and by saving.

A WeightSlice maps the rectangle `src` of tensor `key`, of shape `key_shape`, to `dst` of parameter `path`, transposed
or not. The paths, sizes and keys of parameters are those of parameters.py. Published matrices are [out, in], and fused
matrices of all experts are [expert, in, out]. Parameters are [in, ...out].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.attention_keys import attention_slices
from jaxmoe.families.parameters import HEAD, ParameterDeclaration, checkpoint_parameters, outer_parameters
from jaxmoe.parallel.stages import LayerSegment, locate_layer
from jaxmoe.weight_slice import ArrayIndex, WeightSlice, full_slice

# Order of gate and up in one tensor: alternating columns, or all of gate before all of up
FusedLayout = Literal["interleaved", "halves"]


@dataclass(frozen=True, kw_only=True)
class CheckpointKeys:
    """Hold the tensor names in which model families differ; {e} is the index of the expert.

    prefix: of every key. others: key prefixes of other models in the checkpoint. fused: order of gate and up if one
    tensor holds all experts. stacked_moe: module of an MoE block in checkpoints with stacked experts
    (config.CheckpointLayout).
    """

    prefix: str = ""
    others: tuple[str, ...] = ()
    dense: str = "mlp"
    moe: str = "mlp"
    stacked_moe: str = "mlp"
    router: str = "gate"
    selection_bias: str = ""
    expert_gate: str = "experts.{e}.gate_proj"
    expert_up: str = "experts.{e}.up_proj"
    expert_down: str = "experts.{e}.down_proj"
    fused: FusedLayout | None = None
    shared: str = "shared_expert"


def _key_fields(config: ModelConfig, names: CheckpointKeys, layer: int) -> dict[str, str]:
    """Return the fields of the keys of one layer's parameters."""
    module = f"model.layers.{layer}"
    moe = names.stacked_moe if config.checkpoint.stacked_experts else names.moe
    return {
        "layer": module, "attention": f"{module}.self_attn", "dense": f"{module}.{names.dense}",
        "moe": f"{module}.{moe}", "router": names.router, "selection_bias": names.selection_bias,
        "shared": names.shared,
    }  # fmt: skip


def _whole(declaration: ParameterDeclaration, fields: Mapping[str, str]) -> WeightSlice:
    """Return the weight slice of a parameter that one whole tensor fills. declaration: without padding."""
    shape = tuple(declaration.dims.values())
    key_shape = shape[::-1] if declaration.transposed else shape
    key = declaration.key.format_map(fields)
    return full_slice(key, key_shape, declaration.path, transpose=declaration.transposed)


def _experts(
    declaration: ParameterDeclaration, config: ModelConfig, names: CheckpointKeys, fields: Mapping[str, str]
) -> Iterator[WeightSlice]:
    """Yield the weight slices of the matrices of all experts, or of their biases."""
    key = declaration.key.format_map(fields)
    if not declaration.lead:
        return _expert_biases(declaration, names, key)
    if names.fused or config.checkpoint.stacked_experts:
        return _experts_in_one_tensor(declaration, names, key)
    return _separate_experts(declaration, names, fields["moe"])


def _separate_experts(declaration: ParameterDeclaration, names: CheckpointKeys, module: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of experts stored as one tensor for each matrix [out, in]."""
    gated = "gate_or_up" in declaration.dims
    templates = (names.expert_gate, names.expert_up) if gated else (names.expert_down,)
    count, *_, inputs, outputs = declaration.dims.values()
    for expert in range(count):
        for part, template in enumerate(templates):
            matrix = (expert, part) if gated else (expert,)
            yield full_slice(
                f"{module}.{template.format(e=expert)}.weight", (outputs, inputs), declaration.path, transpose=True,
                dst=(*matrix, slice(0, inputs), slice(0, outputs)),
            )  # fmt: skip


def _experts_in_one_tensor(declaration: ParameterDeclaration, names: CheckpointKeys, key: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of experts stored as one tensor for gate and up, and one for down.

    Fused tensors are [expert, in, out], stacked ones [expert, out, in].
    """
    count, *_, inputs, outputs = declaration.dims.values()
    parts, stacked = _columns(declaration, names.fused), names.fused is None
    key_shape = (inputs, outputs * len(parts))
    for expert in range(count):
        for part, columns in parts:
            src: ArrayIndex = (slice(0, inputs), columns)
            yield WeightSlice(
                key=key, key_shape=(count, *(key_shape[::-1] if stacked else key_shape)),
                src=(expert, *(src[::-1] if stacked else src)), path=declaration.path,
                dst=(expert, *part, slice(0, inputs), slice(0, outputs)), transpose=stacked,
            )  # fmt: skip


def _expert_biases(declaration: ParameterDeclaration, names: CheckpointKeys, key: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of the biases of all experts, stored as one tensor."""
    count, *_, outputs = declaration.dims.values()
    experts, parts = slice(0, count), _columns(declaration, names.fused)
    for part, columns in parts:
        yield WeightSlice(
            key=key, key_shape=(count, outputs * len(parts)), src=(experts, columns), path=declaration.path,
            dst=(experts, *part, slice(0, outputs)),
        )  # fmt: skip


def _columns(declaration: ParameterDeclaration, fused: FusedLayout | None) -> list[tuple[tuple[int, ...], slice]]:
    """Return (index of gate or up in the parameter, its outputs in the tensor) pairs. The index is empty for down."""
    outputs = list(declaration.dims.values())[-1]
    if "gate_or_up" not in declaration.dims:
        return [((), slice(0, outputs))]
    return [
        (
            (part,),
            slice(part, 2 * outputs, 2) if fused == "interleaved" else slice(part * outputs, (part + 1) * outputs),
        )
        for part in (0, 1)
    ]


def _layer(config: ModelConfig, sizes: ArraySizes, names: CheckpointKeys, layer: int) -> Iterator[WeightSlice]:
    """Yield the weight slices of one layer, with paths and indices relative to its block."""
    fields = _key_fields(config, names, layer)
    for declaration in checkpoint_parameters(config, layer):
        if declaration.stored == "whole":
            yield _whole(declaration, fields)
        elif declaration.stored == "experts":
            yield from _experts(declaration, config, names, fields)
        else:
            yield from attention_slices(declaration, config, sizes, fields)


def weight_slices(
    config: ModelConfig,
    sizes: Sequence[ArraySizes],
    names: CheckpointKeys,
    segments: tuple[LayerSegment, ...],
    *,
    layers: Collection[int] | None = None,
) -> Iterator[WeightSlice]:
    """Yield the weight slices of a whole checkpoint, in the order of the layers.

    sizes: array sizes of the layers of each segment. layers: if given, yield only these layers and the parameters
    outside the layer stack.
    """

    def named(weight_slice: WeightSlice) -> WeightSlice:
        return replace(weight_slice, key=names.prefix + weight_slice.key) if names.prefix else weight_slice

    embedding, *last = (_whole(one, {}) for one in outer_parameters(config, ArraySizes.unpadded(config)))
    yield named(embedding)
    for layer in range(config.num_hidden_layers):
        if layers is not None and layer not in layers:
            continue
        location = locate_layer(layer, segments)
        for weight_slice in _layer(config, sizes[location.segment], names, layer):
            yield named(
                replace(
                    weight_slice, path=f"{location.path}/{weight_slice.path}", dst=(location.slot, *weight_slice.dst)
                )
            )
    yield from map(named, last)


def may_stand_unused(key: str, config: ModelConfig, names: CheckpointKeys) -> bool:
    """Return whether inference does not need a tensor that published checkpoints may contain.

    These are rotary tables, the copy of a tied head, multi-token prediction layers, and models other than the text
    model.
    """
    own = key.removeprefix(names.prefix)
    layer = re.match(r"model\.layers\.([1-9][0-9]{0,8})\.", own)
    return (
        own.endswith("rotary_emb.inv_freq")
        or (config.tie_word_embeddings and own == HEAD)
        or (layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < config.mtp_layers)
        or key.startswith(names.others)
    )

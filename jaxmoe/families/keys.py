"""Table of the checkpoint tensors that fill each parameter, used by loading and by saving.

A WeightSlice maps the rectangle `src` of tensor `key`, of shape `key_shape`, to `dst` of parameter `path`, transposed
or not. Published matrices are [out, in], and fused matrices of all experts are [expert, in, out].
Parameters are [in, ...out].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig, MoEConfig
from jaxmoe.families.attention_keys import grouped_attention, latent_attention
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


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"  # of all experts of a layer
_GATED = ("gate", "up", "down")


def _gated(hf_keys: tuple[str, str, str], path: str, width: int, ffn: int) -> Iterator[WeightSlice]:
    """Yield the gate, up and down projections of one SwiGLU."""
    for name, key in zip(_GATED, hf_keys, strict=True):
        shape = (width, ffn) if name == "down" else (ffn, width)
        yield full_slice(f"{key}.weight", shape, f"{path}/{name}", transpose=True)


def _expert(hf_keys: tuple[str, str, str], path: str, width: int, ffn: int, expert: int) -> Iterator[WeightSlice]:
    """Yield the gate, up and down projections of one expert; gate and up fill one parameter."""
    rows, columns = slice(0, width), slice(0, ffn)
    for part, key in enumerate(hf_keys[:2]):
        dst: ArrayIndex = (expert, part, rows, columns)
        yield full_slice(f"{key}.weight", (ffn, width), f"{path}/gate_up", transpose=True, dst=dst)
    yield full_slice(f"{hf_keys[2]}.weight", (width, ffn), f"{path}/down", transpose=True, dst=(expert, columns, rows))


def _projections(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def _dense_mlp(config: ModelConfig, hf: str) -> Iterator[WeightSlice]:
    keys, path = _projections(hf), "mlp"
    width, ffn = config.hidden_size, config.intermediate_size
    yield from _gated(keys, path, width, ffn)
    if config.mlp_bias:
        for name, key in zip(_GATED, keys, strict=True):
            yield full_slice(f"{key}.bias", (width if name == "down" else ffn,), f"{path}/{name}_bias")


def _stacked_experts(moe: MoEConfig, width: int, hf: str) -> Iterator[WeightSlice]:
    """Yield the weight slices of experts stored as one tensor for gate and up [E, 2F, D] and one for down [E, D, F]."""
    count, ffn, path = moe.num_experts, moe.intermediate_size, "moe/experts"
    rows, columns = slice(0, width), slice(0, ffn)
    for expert in range(count):
        for part in (0, 1):
            yield WeightSlice(
                key=f"{hf}.{GATE_UP}", key_shape=(count, 2 * ffn, width),
                src=(expert, slice(part * ffn, (part + 1) * ffn), rows), path=f"{path}/gate_up",
                dst=(expert, part, rows, columns), transpose=True,
            )  # fmt: skip
        yield WeightSlice(
            key=f"{hf}.{DOWN}", key_shape=(count, width, ffn), src=(expert, rows, columns), path=f"{path}/down",
            dst=(expert, columns, rows), transpose=True,
        )  # fmt: skip


def _fused_experts(moe: MoEConfig, width: int, hf: str, fused: FusedLayout) -> Iterator[WeightSlice]:
    """Yield the weight slices of fused experts: gate and up [E, D, 2F], down [E, F, D], and their biases."""
    count, ffn, path = moe.num_experts, moe.intermediate_size, "moe/experts"
    parts = [
        slice(part, 2 * ffn, 2) if fused == "interleaved" else slice(part * ffn, (part + 1) * ffn) for part in (0, 1)
    ]
    rows, columns = slice(0, width), slice(0, ffn)
    for expert in range(count):
        for part, src in enumerate(parts):
            yield WeightSlice(
                key=f"{hf}.{GATE_UP}", key_shape=(count, width, 2 * ffn), src=(expert, rows, src),
                path=f"{path}/gate_up", dst=(expert, part, rows, columns),
            )  # fmt: skip
        yield WeightSlice(
            key=f"{hf}.{DOWN}", key_shape=(count, ffn, width), src=(expert, columns, rows), path=f"{path}/down",
            dst=(expert, columns, rows),
        )  # fmt: skip
    if moe.biases:
        experts = slice(0, count)
        for part, src in enumerate(parts):
            yield WeightSlice(
                key=f"{hf}.{GATE_UP}_bias", key_shape=(count, 2 * ffn), src=(experts, src),
                path=f"{path}/gate_up_bias", dst=(experts, part, columns),
            )  # fmt: skip
        yield full_slice(f"{hf}.{DOWN}_bias", (count, width), "moe/down_bias")


def _moe(config: ModelConfig, names: CheckpointKeys, hf: str) -> Iterator[WeightSlice]:
    assert config.moe is not None
    path, width, moe = "moe", config.hidden_size, config.moe
    yield full_slice(f"{hf}.{names.router}.weight", (moe.num_experts, width), f"{path}/router", transpose=True)
    if moe.router_bias:
        yield full_slice(f"{hf}.{names.router}.bias", (moe.num_experts,), f"{path}/router_bias")
    if moe.selection_bias:
        yield full_slice(f"{hf}.{names.selection_bias}", (moe.num_experts,), f"{path}/selection_bias")
    if names.fused:
        yield from _fused_experts(moe, width, hf, names.fused)
    elif config.checkpoint.stacked_experts:
        yield from _stacked_experts(moe, width, hf)
    else:
        for expert in range(moe.num_experts):
            parts = (names.expert_gate, names.expert_up, names.expert_down)
            gate, up, down = (f"{hf}.{part.format(e=expert)}" for part in parts)
            yield from _expert((gate, up, down), f"{path}/experts", width, moe.intermediate_size, expert)
    if moe.shared_intermediate_size:
        shared = f"{hf}.{names.shared}"
        yield from _gated(_projections(shared), f"{path}/shared", width, moe.shared_intermediate_size)
    if moe.shared_gate:
        yield full_slice(f"{shared}_gate.weight", (1, width), f"{path}/shared_gate", transpose=True)


def _layer(config: ModelConfig, sizes: ArraySizes, names: CheckpointKeys, layer: int) -> Iterator[WeightSlice]:
    """Yield the weight slices of one layer, with paths and indices relative to its block."""
    hf = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield full_slice(f"{hf}.{norm}.weight", (config.hidden_size,), norm)
    attention = grouped_attention if config.mla is None else latent_attention
    yield from attention(config, sizes, f"{hf}.self_attn")
    if config.moe_layers[layer]:
        module = names.stacked_moe if config.checkpoint.stacked_experts else names.moe
        yield from _moe(config, names, f"{hf}.{module}")
    else:
        yield from _dense_mlp(config, f"{hf}.{names.dense}")


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
    width, vocab = config.hidden_size, config.vocab_size

    def named(weight_slice: WeightSlice) -> WeightSlice:
        return replace(weight_slice, key=names.prefix + weight_slice.key) if names.prefix else weight_slice

    yield named(full_slice(HEAD if config.checkpoint.head_is_embedding else EMBEDDING, (vocab, width), "embed"))
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
    yield named(full_slice("model.norm.weight", (width,), "final_norm"))
    if not config.tie_word_embeddings:
        yield named(full_slice(HEAD, (vocab, width), "head", transpose=True))


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

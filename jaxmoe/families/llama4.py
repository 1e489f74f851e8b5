"""Llama 4's text model: chunked attention, layers without RoPE, one routed expert with router weights on its input.

Source: Hugging Face's Llama4TextConfig and modeling_llama4. Images are not supported: only the text model of a
checkpoint with a vision tower is read.
"""

from __future__ import annotations

from functools import partial

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.decoder import read_decoder, read_layer_types
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import ConfigReader, read_num_experts, shown


def _rope_layers(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Return which layers have rotary embedding.

    no_rope_layers holds a 1 for these layers. Without it, every no_rope_layer_interval-th layer lacks rotary embedding.
    """
    said = reader.get("no_rope_layers", None) or None
    interval = reader.whole("no_rope_layer_interval", 4)
    if said is None:
        if interval < 1:
            raise ConfigError(f"config key 'no_rope_layer_interval' = {interval} must be at least 1")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(said, list) or len(said) < layers or any(one not in (0, 1) for one in said):
        raise ConfigError(f"config key 'no_rope_layers' = {shown(said)} must hold 0 or 1 for each of {layers} layers")
    return tuple(bool(one) for one in said[:layers])


def _moe_layers(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Return which layers are MoE: the ones in moe_layers, else every interleave_moe_layer_step-th layer."""
    said, step = reader.get("moe_layers", None), reader.whole("interleave_moe_layer_step", 1)
    if said is None:
        if step < 1:
            raise ConfigError(f"config key 'interleave_moe_layer_step' = {step} must be at least 1")
        said = list(range(step - 1, layers, step))
    if not isinstance(said, list) or any(type(one) is not int or not 0 <= one < layers for one in said):
        raise ConfigError(f"config key 'moe_layers' = {shown(said)} must name layers below {layers}")
    return tuple(layer in said for layer in range(layers))


def _read(reader: ConfigReader, *, family: str) -> ModelConfig:
    shared = read_decoder(reader, default_eps=1e-5, default_theta=500000.0, default_head_dim=128, interleaved=True)
    layers = shared["num_hidden_layers"]
    reader.expect("attention_bias", False, sized=True)
    reader.expect("for_llm_compressor", False)
    rope = _rope_layers(reader, layers)
    types = read_layer_types(reader, ("full_attention", "chunked_attention"), num_layers=layers)
    chunk = reader.whole("attention_chunk_size", None, absent=8192)
    chunked = rope if types is None else tuple(kind == "chunked_attention" for kind in types)
    tuned = reader.get("attn_temperature_tuning", True)  # published as true or as 4
    if type(tuned) not in (bool, int):
        raise ConfigError(f"config key 'attn_temperature_tuning' = {shown(tuned)} must be true or false")
    attn_temperature_tuning = (reader.number("attn_scale", 0.1), reader.whole("floor_scale", 8192))
    width = shared["intermediate_size"]
    shared["intermediate_size"] = reader.whole("intermediate_size_mlp", 16384)
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_local_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok", 1),
        intermediate_size=width,
        norm_topk_prob=False,
        scoring="sigmoid",
        top_k_of="logits",
        apply_router_weight_on_input=True,
        shared_intermediate_size=width,
    )
    return ModelConfig(
        family=family,
        **shared,
        moe=moe,
        moe_layers=_moe_layers(reader, layers),
        sliding_windows=(None,) * layers,
        attention_chunks=tuple(chunk if one else None for one in chunked),
        rope_layers=rope,
        attn_temperature_tuning=attn_temperature_tuning if tuned else None,
        qk_norm="unit" if reader.flag("use_qk_norm", True) else "none",
    )


def _text(family: str, names: CheckpointKeys, part: str | None) -> ModelFamily:
    named = ("Llama4ForCausalLM", *(("Llama4ForConditionalGeneration",) if part else ()))
    return ModelFamily(name=family, read=partial(_read, family=family), names=names, part=part, architectures=named)


FAMILIES = (
    _text(
        "llama4_text",
        CheckpointKeys(dense="feed_forward", moe="feed_forward", router="router", fused="halves"),
        None,
    ),
    _text(
        "llama4",
        CheckpointKeys(
            prefix="language_model.", dense="feed_forward", moe="feed_forward", router="router", fused="halves",
            others=("vision_model.", "multi_modal_projector."),
        ),
        "text_config",
    ),
)  # fmt: skip

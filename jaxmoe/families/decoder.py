"""Readers of the config keys that decoder families share: sizes, attention windows, MoE layers, routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from jaxmoe.config import MLAConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.reader import (
    MAX_HEADS,
    MAX_LAYERS,
    REQUIRED,
    ConfigReader,
    only_supported,
    read_agreed,
    read_dtype,
    shown,
)
from jaxmoe.families.rope_keys import context_length, read_rope

WindowRule = Literal["every layer", "even layers", "from max_window_layers", "even below max_window_layers"]


def read_windows(
    reader: ConfigReader,
    *,
    num_layers: int,
    rule: WindowRule,
    switched: bool,
    typed: bool,
    absent: int | None = None,
) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, by layer_types where present, else by the rule.

    switched: whether windows apply only if use_sliding_window is true. typed: whether the family has layer_types.
    absent: the window if the file lacks sliding_window; null and 0 mean no window. max_window_layers is 28 by default.
    """
    window = reader.whole("sliding_window", None, absent=absent) or None
    enabled = reader.flag("use_sliding_window") if switched else True
    limit = reader.whole("max_window_layers", 28) if "max_window_layers" in rule or switched else 0
    known = ("full_attention", "sliding_attention")
    types = read_layer_types(reader, known, num_layers=num_layers) if typed else None
    if types is None:
        windowed = {
            "every layer": lambda layer: True,
            "from max_window_layers": lambda layer: layer >= limit,
            "even layers": lambda layer: layer % 2 == 0,
            "even below max_window_layers": lambda layer: layer % 2 == 0 and layer < limit,
        }[rule]
        return tuple(window if enabled and windowed(layer) else None for layer in range(num_layers))
    if "sliding_attention" in types and (window is None or not enabled):
        switch = " with use_sliding_window true" if switched else ""
        reader.unsupported(
            "layer_types",
            types,
            f"config key 'layer_types' names sliding_attention but no sliding_window is enabled: give "
            f"sliding_window{switch}, or name full_attention",
        )
        return (None,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def read_decoder(
    reader: ConfigReader,
    *,
    default_head_dim: int | None = None,
    default_eps: float = 1e-6,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
    default_scaling: Mapping[str, Any] = MappingProxyType({}),
    interleaved: bool = False,
    latent: MLAConfig | None = None,
    absent_kv_heads: Literal["needed", "as heads"] = "needed",
    absent_positions: Any = REQUIRED,
) -> dict[str, Any]:
    """Return the keyword arguments of ModelConfig that all Llama-like decoders share.

    default_partial, default_scaling: see read_rope. latent: sizes of latent attention, which give the head dims; all
    heads then share one key-value head. absent_kv_heads: "needed" makes num_key_value_heads required, because
    transformers fills in a number specific to the family; "as heads" uses num_attention_heads. null always means
    num_attention_heads. absent_positions: max_position_embeddings if the file lacks the key.
    """
    _check_activation(reader)
    layers = reader.whole("num_hidden_layers", within=(1, MAX_LAYERS))
    heads = reader.whole("num_attention_heads", within=(1, MAX_HEADS))
    hidden = reader.whole("hidden_size")
    head_dim = reader.whole("head_dim", default_head_dim)
    absent_heads = heads if absent_kv_heads == "as heads" else REQUIRED
    kv_heads = reader.whole("num_key_value_heads", heads, absent=absent_heads)
    positions = reader.whole("max_position_embeddings", absent=absent_positions)
    if positions < 1:
        raise ConfigError(f"max_position_embeddings={positions} must be a whole number of at least 1")
    if latent is not None:
        if kv_heads != heads:
            raise ConfigError(f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads} in this family")
        head_dim, kv_heads = latent.qk_nope_head_dim + latent.qk_rope_head_dim, 1
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(
                f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}, or give head_dim"
            )
        head_dim = hidden // heads
    rope = read_rope(
        reader, head_dim=head_dim if latent is None else latent.qk_rope_head_dim, max_positions=positions,
        default_theta=default_theta, default_partial=default_partial, default_scaling=default_scaling,
        interleaved=interleaved,
    )  # fmt: skip
    return dict(
        vocab_size=reader.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.whole("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context_length(rope, positions),
        rms_norm_eps=reader.number("rms_norm_eps", default_eps),
        rope=rope if latent is None else replace(rope, dims=latent.qk_rope_head_dim),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        dtype=read_dtype(reader),
    )


def _check_activation(reader: ConfigReader) -> None:
    """Raise ConfigError for a hidden_act other than silu, which transformers also calls swish."""
    value = reader.get("hidden_act", "silu")
    if value not in ("silu", "swish"):
        reader.unsupported("hidden_act", value, only_supported("hidden_act", value, "'silu'"))


def read_layer_types(
    reader: ConfigReader,
    known: tuple[str, ...],
    *,
    num_layers: int,
    key: str = "layer_types",
    sized: bool = False,
) -> list[str] | None:
    """Return the kind of each layer from layer_types, or None if the key is absent.

    sized: see ConfigReader.expect. Raises: ConfigError for a kind not in `known`; a lenient reader treats the key as
    absent.
    """
    types = reader.get(key, None)
    if types is None or (isinstance(types, list) and len(types) == num_layers and all(kind in known for kind in types)):
        return types
    has = f" (it has {len(types)})" if isinstance(types, list) and len(types) != num_layers else ""
    odd = next((kind for kind in types if kind not in known), None) if isinstance(types, list) else None
    message = (
        f"config key {key!r} = {shown(types)} must hold one of {known} for each of {num_layers} layers{has}"
        f"{'' if odd is None else f', not {shown(odd)}: use a model with only these'}"
    )
    if sized:
        raise ConfigError(message)
    reader.unsupported(key, types, message)
    return None


def read_dense_prefix(reader: ConfigReader, *, num_layers: int, default: Any) -> tuple[bool, ...]:
    """Return which layers are MoE by DeepSeek's rule: all but the first first_k_dense_replace ones.

    moe_layer_freq must be 1.
    """
    reader.expect("moe_layer_freq", 1, sized=True)
    dense = reader.whole("first_k_dense_replace", default, within=(0, num_layers))
    return tuple(layer >= dense for layer in range(num_layers))


def read_sparse_layers(reader: ConfigReader, *, num_layers: int) -> tuple[bool, ...]:
    """Return which layers are MoE by Qwen's rule.

    Layer i is MoE if (i + 1) % decoder_sparse_step == 0 and mlp_only_layers does not list it.
    """
    step = reader.whole("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"config key 'mlp_only_layers' = {shown(dense)} must be a list of whole numbers")
    if step < 1:
        raise ConfigError(f"config key 'decoder_sparse_step' = {step} must be at least 1")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def read_shared_experts(reader: ConfigReader, width: int, *, default: Any = REQUIRED) -> int:
    """Return the total width of the shared experts, which are computed as one SwiGLU."""
    count = reader.whole("n_shared_experts", default)
    if count < 0:
        raise ConfigError(f"config key 'n_shared_experts' = {count} must be at least 0")
    return count * width


def read_sigmoid_routing(reader: ConfigReader, *, groups: Any = REQUIRED, normed: Any = REQUIRED) -> dict[str, Any]:
    """Return the routing of DeepSeek-V3: sigmoid scores, groups ranked by their two best experts.

    A selection bias affects only the choice of experts. groups, normed: defaults for n_group and topk_group, and for
    norm_topk_prob.
    """
    reader.expect("scoring_func", "sigmoid")
    reader.expect("topk_method", "noaux_tc")
    return dict(
        norm_topk_prob=reader.flag("norm_topk_prob", normed),
        num_groups=reader.whole("n_group", groups),
        top_groups=reader.whole("topk_group", groups),
        experts_per_group_score=2,
        scoring="sigmoid",
        selection_bias=True,
    )


def read_mtp_layers(reader: ConfigReader, *, absent: int) -> int:
    """Return the number of multi-token prediction layers, which checkpoints store after all other layers."""
    keys = "num_nextn_predict_layers", "num_mtp_layers"  # as published, and as transformers writes it
    return read_agreed(
        reader, "layers of multi-token prediction", *keys, default=0, absent=absent, within=(0, MAX_LAYERS)
    )

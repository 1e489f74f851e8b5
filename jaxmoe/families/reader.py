"""Reading a config.json strictly: every key is used, known to be harmless, or an error that names it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from jaxmoe.config import MLAConfig, RopeConfig, canonical_dtype
from jaxmoe.errors import ConfigError

# Keys that do not change the maths of inference: training settings, token ids (the tokenizer's and generation_config's
# business), bookkeeping of the library that wrote the file.
HARMLESS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "experts_implementation", "hidden_dropout",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "language", "license",
    "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "sep_token_id", "task_specific_params", "torch_dtype", "torchscript", "transformers_version", "unk_token_id",
    "use_bfloat16", "use_cache", "use_return_dict",
})  # fmt: skip

REQUIRED = object()  # in place of a default
_AS_NULL = object()
_MAX_WHOLE = 2**31 - 1
MAX_LAYERS = 10_000
_MAX_HEADS = _MAX_EXPERTS = 10_000


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_off(value: Any) -> bool:
    """Whether a key nobody knows says nothing: null, false, an empty list or object. A zero may mean something."""
    return value is None or value is False or value == [] or value == {}


class ConfigReader:
    """Hands out the values of one config.json and remembers which were asked for."""

    def __init__(self, raw: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> None:
        self._raw = dict(raw)
        self._used = set(ignore)

    def get(self, key: str, default: Any = REQUIRED, *, absent: Any = _AS_NULL) -> Any:
        """The value of key; default where it is null. absent: what a file without the key means, by default the same.

        Raises: ConfigError where it is required and not there.
        """
        self._used.add(key)
        value = self._raw.get(key)
        if value is None:
            default = default if absent is _AS_NULL or key in self._raw else absent
            if default is REQUIRED:
                raise ConfigError(f"config.json has no {key!r}, which this family needs: add it")
            return default
        return value

    def whole(
        self, key: str, default: Any = REQUIRED, *, absent: Any = _AS_NULL, within: tuple[int, int] | None = None
    ) -> Any:
        """A whole number (or the default), within limits. absent: see get."""
        value = self.get(key, default, absent=absent)
        if value is default or value is absent:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"config key {key!r} = {value!r} must be a whole number")
        if abs(value) > _MAX_WHOLE:
            raise ConfigError(f"config key {key!r} = {str(value)[:20]}... must lie within +-{_MAX_WHOLE}")
        if within is not None and not within[0] <= value <= within[1]:
            raise ConfigError(f"config key {key!r} = {value} must lie in [{within[0]}, {within[1]}]")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number (or the default)."""
        value = self.get(key, default)
        if value is default:
            return value
        if not _is_finite(value):
            raise ConfigError(f"config key {key!r} = {str(value)[:60]} must be a finite number")
        return float(value)

    def flag(self, key: str, default: Any = False) -> bool:
        """True or false (or the default)."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config key {key!r} = {value!r} must be true or false")
        return value

    def expect(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Insist on one of the values the family implements. Raises ConfigError naming key, value and choices."""
        value = self.get(key, default)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"config key {key!r} = {value!r} changes the maths and only {choices} is supported")

    def finish(self, where: str, remedy: str) -> None:
        """Raise ConfigError for any key nobody asked for that could change the maths. where: whose keys these are."""
        unknown = sorted(
            key
            for key, value in self._raw.items()
            if key not in self._used and key not in HARMLESS and not _is_off(value)
        )
        if unknown:
            shown = ", ".join(f"{key!r} = {str(self._raw[key])[:60]}" for key in unknown)
            raise ConfigError(
                f"config.json {where} has keys that may change the maths and are not supported: {shown}; {remedy}"
            )


def read_dtype(reader: ConfigReader) -> str:
    """The dtype the checkpoint was published in ("bfloat16" when it does not say)."""
    said = reader.get("torch_dtype", None)
    dtype = canonical_dtype(str(reader.get("dtype", "bfloat16") if said is None else said))
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"config key 'torch_dtype' = {dtype!r} must be bfloat16, float16 or float32")
    return dtype


# What a rope_scaling of each kind needs, and may have beside it.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN_MAY = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
_ROPE_SETTINGS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_scaling(reader: ConfigReader, default: Mapping[str, Any] = MappingProxyType({})) -> Mapping[str, Any]:
    """The published rope_scaling, or the newer rope_parameters; default where there is neither. Raises: ConfigError."""
    newer, published = reader.get("rope_parameters", None), reader.get("rope_scaling", None)
    if published is not None and newer is not None:
        raise ConfigError("config keys 'rope_scaling' and 'rope_parameters' are both given: keep one")
    scaling = published if published is not None else newer if newer is not None else default
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config key 'rope_scaling' = {scaling!r} must be an object or null")
    return scaling


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
    default_scaling: Mapping[str, Any] = MappingProxyType({}),
    interleaved: bool = False,
) -> RopeConfig:
    """Rotary settings in the published form (rope_theta, rope_scaling) or the newer one (rope_parameters).

    default_partial: the share of a head that is turned, where the file does not say; None where a family turns all.
    default_scaling: a rope_scaling where the file has none.
    Raises: ConfigError for an unknown scaling, or a key of it that is unknown.
    """
    top_theta = reader.number("rope_theta", None)
    scaling = rope_scaling(reader, default_scaling)
    inner = ConfigReader(scaling)
    inner_theta = inner.number("rope_theta", None)
    theta = inner_theta if inner_theta is not None else top_theta if top_theta is not None else default_theta
    if default_partial is None:
        for one in (inner, reader):
            one.expect("partial_rotary_factor", 1, 1.0)
    said = [one.number("partial_rotary_factor", None) for one in (inner, reader)]
    partial = next((one for one in said if one is not None), default_partial or 1.0)
    if not 0 < partial <= 1:
        raise ConfigError(f"config key 'partial_rotary_factor' = {partial} must lie above 0 and not above 1")
    kind = inner.get("rope_type", None)
    kind = inner.get("type", "default") if kind is None else kind
    kind = "none" if kind == "default" else kind
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise ConfigError(
            f"config key 'rope_scaling' has rope_type {kind!r}; supported are default, "
            f"{', '.join(name for name in _ROPE_NEEDS if name != 'none')}"
        )
    scaling = {key: value for key, value in scaling.items() if key not in _ROPE_SETTINGS}
    if extra := sorted(set(scaling) - set(_ROPE_NEEDS[kind]) - set(_YARN_MAY if kind == "yarn" else ())):
        raise ConfigError(f"config key 'rope_scaling' has unsupported keys {extra} for rope_type {kind!r}")
    if missing := [key for key in _ROPE_NEEDS[kind] if not _is_finite(scaling.get(key))]:
        raise ConfigError(f"config key 'rope_scaling' of rope_type {kind!r} lacks the numbers {missing}")
    dims = int(head_dim * partial)
    common: dict[str, Any] = dict(dims=0 if dims == head_dim else dims, interleaved=interleaved)
    if kind == "yarn":
        return RopeConfig(theta=theta, scaling=kind, **_yarn(ConfigReader(scaling)), **common)
    return RopeConfig(theta=theta, scaling=kind, **scaling, **common)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much YaRN sharpens attention for a context that grew by factor. Source: YaRN, DeepSeek's modeling code."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(scaling: ConfigReader) -> dict[str, Any]:
    factor = scaling.number("factor")
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    default = yarn_mscale(factor, 1.0)
    if mscale and all_dim:
        default = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return dict(
        factor=factor,
        original_max_position_embeddings=scaling.whole("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=scaling.number("attention_factor", default),
    )


WindowRule = Literal["every layer", "even layers", "from max_window_layers", "even below max_window_layers"]


def read_windows(
    reader: ConfigReader, *, num_layers: int, rule: WindowRule, switched: bool, absent: int | None = None
) -> tuple[int | None, ...]:
    """The sliding window of each layer: those the rule names, or layer by layer what layer_types says.

    switched: a window counts only with use_sliding_window true. max_window_layers is 28 where absent. absent: the
    window where the key does not stand at all; null and 0 mean none.
    """
    window = reader.whole("sliding_window", None, absent=absent) or None
    enabled = reader.flag("use_sliding_window") if switched else True
    limit = reader.whole("max_window_layers", 28) if "max_window_layers" in rule or switched else 0
    types = read_layer_types(reader, ("full_attention", "sliding_attention"), num_layers=num_layers)
    if types is None:
        windowed = {
            "every layer": lambda layer: True,
            "from max_window_layers": lambda layer: layer >= limit,
            "even layers": lambda layer: layer % 2 == 0,
            "even below max_window_layers": lambda layer: layer % 2 == 0 and layer < limit,
        }[rule]
        return tuple(window if enabled and windowed(layer) else None for layer in range(num_layers))
    if "sliding_attention" in types and (window is None or not enabled):
        raise ConfigError("config key 'layer_types' names sliding_attention but no sliding_window is switched on")
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
) -> dict[str, Any]:
    """What every Llama-like decoder shares, as keyword arguments of ModelConfig. default_partial, default_scaling: see
    read_rope.

    latent: of a family whose heads share one: their sizes are its own.
    """
    reader.expect("hidden_act", "silu", default="silu")
    layers = reader.whole("num_hidden_layers", within=(1, MAX_LAYERS))
    heads = reader.whole("num_attention_heads", within=(1, _MAX_HEADS))
    hidden = reader.whole("hidden_size")
    head_dim = reader.whole("head_dim", default_head_dim)
    kv_heads = reader.whole("num_key_value_heads", heads)
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
        reader, head_dim=head_dim if latent is None else latent.qk_rope_head_dim, default_theta=default_theta,
        default_partial=default_partial, default_scaling=default_scaling, interleaved=interleaved,
    )  # fmt: skip
    return dict(
        vocab_size=reader.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.whole("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.whole("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps", default_eps),
        rope=rope if latent is None else replace(rope, dims=latent.qk_rope_head_dim),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        dtype=read_dtype(reader),
    )


def read_layer_types(reader: ConfigReader, known: tuple[str, ...], *, num_layers: int) -> list[str] | None:
    """What layer_types says of each layer, None where it is absent. Raises: ConfigError for a kind not in known."""
    types = reader.get("layer_types", None)
    if types is not None and (
        not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types)
    ):
        raise ConfigError(
            f"config key 'layer_types' = {types} must hold one of {known} for each of {num_layers} layers"
        )
    return types


def read_dense_prefix(reader: ConfigReader, *, num_layers: int, default: Any) -> tuple[bool, ...]:
    """DeepSeek's rule: the first first_k_dense_replace layers are dense, all others MoE (moe_layer_freq 1)."""
    reader.expect("moe_layer_freq", 1)
    dense = reader.whole("first_k_dense_replace", default, within=(0, num_layers))
    return tuple(layer >= dense for layer in range(num_layers))


def read_sparse_layers(reader: ConfigReader, *, num_layers: int) -> tuple[bool, ...]:
    """Qwen's rule: layer i is MoE unless it stands in mlp_only_layers, and (i + 1) % decoder_sparse_step == 0."""
    step = reader.whole("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"config key 'mlp_only_layers' = {dense} must be a list of whole numbers")
    if step < 1:
        raise ConfigError(f"config key 'decoder_sparse_step' = {step} must be at least 1")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def read_agreed(reader: ConfigReader, what: str, *keys: str, **how: Any) -> Any:
    """A whole number under whichever of the keys the file uses; they must agree. how: of ConfigReader.whole."""
    used = [key for key in keys if reader.get(key, None) is not None] or keys[:1]
    counts = {key: reader.whole(key, **how) for key in used}
    if len(set(counts.values())) != 1:
        raise ConfigError(f"config.json gives different numbers of {what}: {counts}; keep one")
    return counts[used[0]]


def read_num_experts(reader: ConfigReader, *keys: str) -> int:
    """How many experts there are, as read_agreed."""
    return read_agreed(reader, "experts", *keys, within=(1, _MAX_EXPERTS))

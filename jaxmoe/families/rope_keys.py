"""Reading rotary embedding: rope_theta, rope_scaling, and the newer rope_parameters, as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmoe.config import RopeConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.reader import MAX_WHOLE, ConfigReader, is_finite

_ORIGINAL = "original_max_position_embeddings"
# What a rope_scaling of each kind needs, and may have beside it.
_NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_MAY: dict[str, tuple[str, ...]] = {
    "llama3": (_ORIGINAL,),
    "yarn": (_ORIGINAL, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
_SETTINGS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")  # of any kind; a label, the last


def rope_scaling(reader: ConfigReader, default: Mapping[str, Any] = MappingProxyType({})) -> Mapping[str, Any]:
    """Return the published rope_scaling, the newer rope_parameters, or both where they say the same; default where
    there is neither.

    Raises: ConfigError where one is no object, or they differ.
    """
    newer, published = reader.get("rope_parameters", None), reader.get("rope_scaling", None)
    for key, value in (("rope_scaling", published), ("rope_parameters", newer)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"config key {key!r} = {str(value)[:60]!r} must be an object or null")
    if published and newer:
        one, other = _resolved(reader, published), _resolved(reader, newer)
        if differ := sorted(str(key) for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            raise ConfigError(
                f"config keys 'rope_scaling' and 'rope_parameters' differ in {', '.join(differ)}: keep one of them"
            )
        return {**newer, **published}
    return published or (newer if newer is not None else default)


def _resolved(reader: ConfigReader, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """What one of the two says, with what it leaves to defaults and to keys beside it; nulls left out."""
    kind = _kind(scaling)
    said = {key: value for key, value in scaling.items() if value is not None and key not in ("type", "finetuned")}
    beside = {key: reader.get(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    if kind == "yarn":
        beside |= _YARN_DEFAULTS | ({"truncate": False} if scaling.get("truncate", True) is None else {})
    if kind in ("llama3", "yarn"):
        beside[_ORIGINAL] = reader.get("max_position_embeddings", None)
    return {key: value for key, value in (beside | said | {"rope_type": kind}).items() if value is not None}


def _kind(scaling: Mapping[str, Any]) -> Any:
    kind = scaling.get("rope_type")
    kind = scaling.get("type") if kind is None else kind
    return "none" if kind in (None, "default") else kind


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10000.0,
    default_partial: float | None = None,
    default_scaling: Mapping[str, Any] = MappingProxyType({}),
    interleaved: bool = False,
) -> RopeConfig:
    """Read rotary settings in the published form (rope_theta, rope_scaling) or the newer one (rope_parameters).

    max_positions: max_position_embeddings as the file has it. default_partial: the share of a head that is turned,
    where the file does not say; None where a family turns all. default_scaling: a rope_scaling where the file has none.
    Raises: ConfigError for an unknown scaling, or a key of it that is unknown.
    """
    top_theta = reader.number("rope_theta", None)
    original = reader.whole(_ORIGINAL, None)
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
    dims = int(head_dim * partial)
    common: dict[str, Any] = dict(theta=theta, dims=0 if dims == head_dim else dims, interleaved=interleaved)
    kind = _checked_kind(reader, scaling)
    values = {key: scaling[key] for key in (*_NEEDS[kind], *_MAY.get(kind, ())) if key in scaling}
    if original is not None:  # beside rope_scaling, where transformers prefers it
        values[_ORIGINAL] = original
    if kind == "yarn":
        return RopeConfig(scaling=kind, **_yarn(ConfigReader(values), max_positions), **common)
    if kind == "llama3":
        values[_ORIGINAL] = ConfigReader(values).whole(_ORIGINAL, max_positions)
    return RopeConfig(scaling=kind, **{key: values[key] for key in (*_NEEDS[kind], *_MAY.get(kind, ()))}, **common)


def _checked_kind(reader: ConfigReader, scaling: Mapping[str, Any]) -> str:
    """The kind of a rope_scaling whose keys are known. Raises: ConfigError; a lenient reader takes it as "none"."""
    kind = _kind(scaling)
    if not isinstance(kind, str) or kind not in _NEEDS:
        reader.unsupported(
            "rope_scaling",
            kind,
            f"config key 'rope_scaling' has rope_type {kind!r}; supported are default, "
            f"{', '.join(name for name in _NEEDS if name != 'none')}",
        )
        return "none"
    known = (*_NEEDS[kind], *_MAY.get(kind, ()), *_SETTINGS)
    if extra := sorted(str(key) for key, value in scaling.items() if key not in known and value is not None):
        message = f"config key 'rope_scaling' has unsupported keys {extra} for rope_type {kind!r}"
        reader.unsupported("rope_scaling", {key: scaling.get(key) for key in extra}, message)
    null_factor = kind == "yarn" and "factor" in scaling and scaling["factor"] is None  # the ratio of lengths
    needed = () if null_factor else _NEEDS[kind]
    if missing := [key for key in needed if not is_finite(scaling.get(key))]:
        raise ConfigError(f"config key 'rope_scaling' of rope_type {kind!r} lacks the numbers {missing}")
    return kind


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much YaRN sharpens attention for a context that grew by factor. Source: YaRN, DeepSeek's modeling code."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(scaling: ConfigReader, max_positions: int) -> dict[str, Any]:
    original = scaling.whole(_ORIGINAL, max_positions)
    if original < 1:
        raise ConfigError(f"rope_scaling {_ORIGINAL}={original} must be above 0 for rope_type yarn")
    factor = scaling.number("factor", max_positions / original)
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    default = yarn_mscale(factor, 1.0)
    if mscale and all_dim:
        default = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    truncate = scaling.get("truncate", False, absent=True)  # null is false, as transformers takes it
    if not isinstance(truncate, bool):
        raise ConfigError(f"config key 'truncate' = {truncate!r} must be true, false or null")
    return dict(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0) or 1.0,
        truncate=truncate,
        attention_factor=scaling.number("attention_factor", default),
    )


def context_length(rope: RopeConfig, max_positions: int) -> int:
    """Return the most positions of a sequence: max_position_embeddings, or YaRN's factor times the original context
    where that is more, as it is where YaRN was added to a published config by hand.

    Raises: ConfigError where that is beyond any context.
    """
    if rope.scaling != "yarn":
        return max_positions
    stretched = rope.factor * rope.original_max_position_embeddings
    if stretched > MAX_WHOLE:
        raise ConfigError(
            f"rope_scaling factor={rope.factor} makes a context of {stretched:.3g} positions, at most {MAX_WHOLE} "
            f"are supported"
        )
    return max(max_positions, int(stretched))

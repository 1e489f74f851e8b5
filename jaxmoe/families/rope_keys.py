"""Reader of rotary embedding settings: rope_theta, rope_scaling and rope_parameters, as transformers reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from jaxmoe.checks import is_finite
from jaxmoe.config import RopeConfig
from jaxmoe.errors import ConfigError
from jaxmoe.families.reader import MAX_NUMBER, MAX_SHOWN, MAX_WHOLE, ConfigReader, and_more, shown, shown_settings

_ORIGINAL = "original_max_position_embeddings"
# Required and optional keys of each kind of rope_scaling.
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
_FIELDS = {
    kind: (*needed, *(key for key in _MAY.get(kind, ()) if not key.startswith("mscale")))
    for kind, needed in _NEEDS.items()
}  # fields of RopeConfig
_FORMS = ("rope_scaling", "rope_parameters")  # the published key and the newer one
# Keys of any kind; the last is only a label.
_SETTINGS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def rope_scalings(reader: ConfigReader) -> dict[str, Mapping[str, Any]]:
    """Return the objects rope_scaling and rope_parameters that the file has, by key.

    Raises: ConfigError if one is not an object.
    """
    scalings: dict[str, Mapping[str, Any]] = {}
    for key in _FORMS:
        value = reader.get(key, None)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be an object or null")
        if value or (key == "rope_parameters" and not scalings):
            scalings[key] = value
    return scalings


def check_agree(reader: ConfigReader, differ: Sequence[str]) -> None:
    """Raise ConfigError for settings in which the two forms differ; a lenient reader records them instead."""
    reader.unsupported(
        _FORMS[1],
        reader.stated(_FORMS[1]),
        f"config keys 'rope_scaling' and 'rope_parameters' differ in {', '.join(differ)}: keep one of them",
    )


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
    """Read rotary settings from rope_theta and rope_scaling, from rope_parameters, or from both if they agree.

    max_positions: max_position_embeddings of the file. default_partial: fraction of a head's dims to rotate if the file
    has no partial_rotary_factor; None for families that rotate all dims. default_scaling: rope_scaling if the file has
    none.
    Raises: ConfigError for an unknown rope_type, an unknown key of rope_scaling, or two forms that differ.
    """
    forms = rope_scalings(reader)
    first, *others = (
        _read_form(
            reader, key, scaling, head_dim=head_dim, max_positions=max_positions, default_theta=default_theta,
            default_partial=default_partial, interleaved=interleaved,
        )
        for key, scaling in (forms or {_FORMS[0]: default_scaling}).items()
    )  # fmt: skip
    for other in others:
        if differ := _differences(first, other, forms):
            check_agree(reader, differ)
    return first


def _differences(one: RopeConfig, other: RopeConfig, forms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the settings in which two configs differ, by their names in config.json.

    An attention_factor that only follows from other settings is left out.
    """
    names = {"theta": "rope_theta", "scaling": "rope_type", "dims": "partial_rotary_factor"}
    differ = {field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)}
    if len(differ) > 1 and not any("attention_factor" in form for form in forms.values()):
        differ.discard("attention_factor")
    return sorted(names.get(name, name) for name in differ)


def _read_form(
    reader: ConfigReader,
    form: str,
    scaling: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float,
    default_partial: float | None,
    interleaved: bool,
) -> RopeConfig:
    """Return the RopeConfig of one of the two forms and the keys at the top level. form: its key in config.json."""
    original = reader.whole(_ORIGINAL, None)
    inner = reader.inside(scaling)
    thetas = [one.number("rope_theta", None) for one in (inner, reader)]
    theta = next((one for one in thetas if one is not None), default_theta)
    if default_partial is None:
        for one in (inner, reader):
            one.expect("partial_rotary_factor", 1, 1.0)
    said = [one.number("partial_rotary_factor", None) for one in (inner, reader)]
    partial = next((one for one in said if one is not None), default_partial or 1.0)
    if not 0 < partial <= 1:
        raise ConfigError(f"config key 'partial_rotary_factor' = {partial} must lie above 0 and not above 1")
    dims = int(head_dim * partial)
    kind = _checked_kind(reader, form, scaling)
    values = {key: scaling[key] for key in (*_NEEDS[kind], *_MAY.get(kind, ())) if key in scaling}
    if original is not None:  # transformers prefers the value at the top level
        values[_ORIGINAL] = original
    if kind == "yarn":
        values = _yarn(ConfigReader(values), max_positions)
    elif kind == "llama3":
        values[_ORIGINAL] = ConfigReader(values).whole(_ORIGINAL, max_positions)
    known: dict[str, Any] = {key: values[key] for key in _FIELDS[kind]}
    return RopeConfig(
        scaling=kind,
        theta=theta,
        dims=0 if dims == head_dim else dims,
        interleaved=interleaved,
        **known,
    )


def _kind(scaling: Mapping[str, Any]) -> Any:
    kind = scaling.get("rope_type")
    kind = scaling.get("type") if kind is None else kind
    return "none" if kind in (None, "default") else kind


def _checked_kind(reader: ConfigReader, form: str, scaling: Mapping[str, Any]) -> str:
    """Return the rope_type of a rope_scaling after checking its keys.

    Raises: ConfigError for an unsupported one; a lenient reader returns "none" for an unknown rope_type.
    """
    kind = _kind(scaling)
    kinds = ", ".join(name for name in _NEEDS if name != "none")
    if not isinstance(kind, str) or kind not in _NEEDS:
        reader.unsupported(
            form,
            kind,
            f"config key {form!r} has rope_type {shown(kind)}; supported are default, {kinds}: use a model with one of "
            f"these",
        )
        return "none"
    known = (*_NEEDS[kind], *_MAY.get(kind, ()), *_SETTINGS)
    if extra := sorted(str(key) for key, value in scaling.items() if key not in known and value is not None):
        which = shown(extra[:MAX_SHOWN]) + and_more(len(extra))
        if kind != "none":
            message = f"has unsupported keys {which} for rope_type {kind!r}: leave them out, or give another rope_type"
        elif scaling.get("rope_type", scaling.get("type")) is None:
            message = f"has {which} and no rope_type: add it ({kinds}), or leave them out"
        else:
            message = f"has unsupported keys {which} for rope_type 'default': leave them out, or give {kinds}"
        said = {key: scaling.get(key) for key in extra}
        reader.unsupported(form, said, f"config key {form!r} {message}")
    # A null factor of YaRN means the ratio of the context lengths.
    null_factor = kind == "yarn" and "factor" in scaling and scaling["factor"] is None
    needed = () if null_factor else _NEEDS[kind]
    wrong = {
        key: scaling[key]
        for key in needed
        if scaling.get(key) is not None and not is_finite(scaling[key], below=MAX_NUMBER)
    }
    if wrong:
        raise ConfigError(
            f"config key {form!r} of rope_type {kind!r} has {shown_settings(wrong)}: give a finite number, without "
            f"quotes"
        )
    if missing := [key for key in needed if scaling.get(key) is None]:
        raise ConfigError(f"config key {form!r} of rope_type {kind!r} lacks the numbers {missing}: add them")
    return kind


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's scale for attention over a context extended by factor. Source: YaRN, DeepSeek's modeling code."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(scaling: ConfigReader, max_positions: int) -> dict[str, Any]:
    original = scaling.whole(_ORIGINAL, max_positions)
    if original < 1:
        raise ConfigError(f"rope_scaling {_ORIGINAL}={original} must be above 0 for rope_type yarn")
    factor = scaling.number("factor", None)
    if factor is None:
        factor = max_positions / original
        if factor < 1:
            raise ConfigError(
                f"rope_scaling factor null means max_position_embeddings={max_positions} divided by {_ORIGINAL}="
                f"{original}, {factor:.4g}, which must be at least 1: give a factor, or correct the lengths"
            )
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    default = yarn_mscale(factor, 1.0)
    if mscale and all_dim:
        default = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    truncate = scaling.get("truncate", False, absent=True)  # transformers reads null as false
    if not isinstance(truncate, bool):
        raise ConfigError(f"config key 'truncate' = {shown(truncate)} must be true, false or null")
    return dict(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0) or 1.0,
        truncate=truncate,
        attention_factor=scaling.number("attention_factor", default),
    )


def context_length(rope: RopeConfig, max_positions: int) -> int:
    """Return the maximum number of positions of a sequence.

    It is max_position_embeddings, or YaRN's factor times the original context if that is larger. That happens if YaRN
    was added to a published config by hand.
    Raises: ConfigError if it exceeds MAX_WHOLE.
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

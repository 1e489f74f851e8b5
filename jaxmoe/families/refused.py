"""Keys that make a config.json unsupported: another model, custom modeling code, or unknown keys."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jaxmoe.errors import ConfigError
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.known_keys import is_suspicious
from jaxmoe.families.reader import MAX_SHOWN, ConfigReader, and_more, shown, shown_settings

_log = logging.getLogger("jaxmoe")
_NO_MODEL = ("AutoFeatureExtractor", "AutoImageProcessor", "AutoProcessor", "AutoTokenizer", "AutoVideoProcessor")


def foreign_keys(raw: Mapping[str, Any], family: ModelFamily) -> dict[str, Any]:
    """Return `architectures` and `auto_map` if they name another model or custom modeling code.

    Another model is one that is not the family's causal language model.
    """
    foreign: dict[str, Any] = {}
    named = raw.get("architectures")
    known = {name.lower() for name in family.architectures}
    for one in named if isinstance(named, list) else [named] if named else []:
        if not isinstance(one, str) or one.lower() not in known:
            foreign["architectures"] = named
    code = raw.get("auto_map")
    if isinstance(code, Mapping):
        code = {key: value for key, value in code.items() if key not in _NO_MODEL}
    if code and not family.own_code:
        foreign["auto_map"] = code
    return foreign


def suspicious_keys(reader: ConfigReader) -> dict[str, Any]:
    """Return the unknown keys that may change the computation, by their names; log the others as warnings."""
    unknown = reader.unknown()
    harmless = {key: value for key, value in unknown.items() if not is_suspicious(key)}
    for key, value in list(harmless.items())[:MAX_SHOWN]:
        _log_once(f"config.json: key {shown(key)} = {shown(value)} is unknown and ignored")
    if more := and_more(len(harmless)):
        _log_once(f"config.json:{more} keys are unknown and ignored")
    return {key: value for key, value in unknown.items() if key not in harmless}


def refusal(family: ModelFamily, refused: Mapping[str, Any]) -> ConfigError:
    """Return the error for keys of foreign_keys and suspicious_keys, which ends in the options that ignore them."""
    unknown = {key: value for key, value in refused.items() if key not in ("architectures", "auto_map")}
    reasons = []
    if "architectures" in refused:
        reasons.append(f"architectures {shown(refused['architectures'], 80)} instead of {family.architectures[0]}")
    if "auto_map" in refused:
        reasons.append(f"custom modeling code (auto_map {shown(refused['auto_map'], 80)}), which is not run")
    if unknown:
        reasons.append(f"keys that may change the computation and are not supported: {shown_settings(unknown)}")
    options = [f"--ignore-config-key {shlex.quote(str(key))}" for key in refused if _can_be_pasted(key)]
    paste = ", or " + " ".join(options[:MAX_SHOWN]) + and_more(len(options)) if options else ""
    return ConfigError(
        f"config.json of family {family.name!r} has {'; '.join(reasons)}; if harmless, pass ignore_config_keys{paste}"
    )


def noted(settings: Mapping[str, Any]) -> list[str]:
    """Return "key = value" of each setting for a report, without control characters."""
    return [f"{key if _can_be_pasted(key) else shown(key)} = {shown(value)}" for key, value in settings.items()]


def _can_be_pasted(key: Any) -> bool:
    """Return whether a key is readable and short enough to be given as an option."""
    return isinstance(key, str) and key.isprintable() and len(key) <= 60


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    """Log a warning once, because a command reads its config.json more than once."""
    _log.warning(message)

"""Command-line options of EngineConfig: one for each of its options, with the same name, default and help text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from jaxmoe.config.engine import OPTION_FIELDS

_TYPES = {"int": int, "float": float, "str": str, "Any": str}
_FLAGS = {"ignore_config_keys": "--ignore-config-key"}


def engine_option(name: str, **changes: Any) -> Callable[..., Any]:
    """Return the click option of one option of EngineConfig.

    changes: Parameters of click.option that replace the field's, as in required, default or help. A default of
    None leaves the option unset, so that the command's request decides.
    """
    field = OPTION_FIELDS[name]
    declared: dict[str, Any] = {"help": field.metadata["help"]}
    if field.type == "bool":
        declared["is_flag"] = True
    elif name in _FLAGS:
        declared["multiple"] = True
    else:
        declared["type"] = _TYPES[str(field.type).split(" ")[0]]
        if field.default is not None and not changes.get("required"):
            declared |= {"default": field.default, "show_default": True}
    declared |= changes
    if declared.get("default", ...) is None:
        declared.pop("show_default", None)
    return click.option(_FLAGS.get(name, "--" + name.replace("_", "-")), name, **declared)


def engine_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options of EngineConfig to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = engine_option(name)(command)
        return command

    return add

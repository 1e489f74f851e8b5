"""Write hardware facts as a TOML file that read_hardware reads back to the same facts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from jaxmoe.files import write_whole
from jaxmoe.planner.hardware import HardwareSpec, read_hardware

_TABLES = ("tflops", "attained")
_MEASURED = ("collectives", "collectives_between_nodes")


def hardware_text(
    hardware: HardwareSpec,
    *,
    axes: Mapping[str, int] | None = None,
    heading: Iterable[str] = (),
    notes: Mapping[str, str] | None = None,
) -> str:
    """Format the facts as TOML. heading: comment lines at the top. notes: trailing comments by key of [hardware]."""
    notes = notes or {}
    lines = [f"# {one}" for one in heading]
    if axes:
        lines += ["[axes]", *(f"{axis} = {size}" for axis, size in axes.items()), ""]
    lines.append("[hardware]")
    for one in fields(hardware):
        value = getattr(hardware, one.name)
        if one.name in (*_TABLES, *_MEASURED) or (one.default is not MISSING and value == one.default):
            continue
        note = f"  # {notes[one.name]}" if one.name in notes else ""
        lines.append(f"{one.name} = {_value(value)}{note}")
    for table in _TABLES:
        if rates := getattr(hardware, table):
            lines += ["", f"[{table}]", *(f"{key} = {_value(rate)}" for key, rate in rates.items())]
    for table in _MEASURED:
        for op, by_ranks in getattr(hardware, table).items():
            lines += ["", f"[{table}.{op}]"]
            for ranks, points in by_ranks.items():
                pairs = ", ".join(f"[{_value(size)}, {_value(us)}]" for size, us in points)
                lines.append(f"{ranks} = [{pairs}]")
    return "\n".join(lines) + "\n"


def write_hardware(path: Path, text: str, hardware: HardwareSpec) -> None:
    """Write text to path after checking that it reads back to the same facts; replace an existing file atomically.

    Raises: OSError if the folder cannot be written.
    """

    def check(partial: Path) -> None:
        assert read_hardware(str(partial)) == hardware, f"{path} would not read back to the measured facts"

    write_whole(path, text, check=check)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(int(value)) if value == int(value) else repr(value)

"""Tables that compare the collectives of compiled steps with the planned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def collectives_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of aot.compile.collective_rows; rows whose count differs from the plan are marked."""
    table = Table(title="collectives of a step", title_justify="left")
    for name in ("step", "collective", "axes"):
        table.add_column(name, overflow="fold")
    for name in ("per step", "bytes each", "planned"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in rows:
        counts = str(one["count"]), f"{one['bytes']:,}", str(one["planned"])
        table.add_row(one["phase"], one["op"], ", ".join(one["axes"]), *counts, "DIFFERS" * _differs(one))
    return table


def print_differing(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each step whose collectives differ from the plan."""
    for phase in dict.fromkeys(one["phase"] for one in rows):
        differ = [_differs(one) for one in rows if one["phase"] == phase]
        if any(differ):
            print(f"{phase} is not as planned: {sum(differ)} of {len(differ)} collectives differ")


def _differs(one: dict[str, Any]) -> bool:
    return one["count"] != one["planned"]

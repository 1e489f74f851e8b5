"""Compare the result of `jaxmoe compile --json` with the collectives that the map plans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.aot.request import InspectRequest
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.errors import ConfigError

_ROW = ("phase", "op", "axes", "count", "bytes")
_OPTIONS = {
    "mesh": "--mesh", "layout": "--layout", "virtual_stages": "--virtual-stages", "dtype": "--dtype",
    "kv_dtype": "--kv-dtype", "dispatch": "--dispatch", "max_num_seqs": "--max-num-seqs", "context": "--context",
    "chunk_tokens": "--chunk-tokens", "family": "MODEL",
}  # fmt: skip


def read_compile_result(path: str) -> dict[str, Any]:
    """Read a compile result. Raises: ConfigError naming the file if it is not one."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: give the output of jaxmoe compile --json") from error
    if not _is_compile_result(result):
        raise ConfigError(f"{path} is not an output of jaxmoe compile --json")
    return result


def _is_compile_result(result: Any) -> bool:
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("mesh", "bytes")):
        return False
    if not isinstance(result.get("target", ""), str):
        return False
    if not all(key in result["bytes"] for key in ("weights", "kv", "temp", "total", "limit")):
        return False
    rows = result.get("collectives")
    return isinstance(rows, list) and all(isinstance(row, dict) and all(key in row for key in _ROW) for row in rows)


def check_compile_result(
    result: Mapping[str, Any], request: InspectRequest, runner: ModelRunner, axes: Mapping[str, int]
) -> None:
    """Raise ConfigError if the result belongs to another request, naming the difference, or does not say so."""
    sizes, placement = request.sizes, runner.placement
    here = {
        "mesh": dict(axes), "layout": str(placement.layout), "virtual_stages": placement.virtual_stages,
        "dtype": runner.dtype, "kv_dtype": runner.kv_dtype, "dispatch": runner.kernels.dispatch,
        "max_num_seqs": sizes["max_num_seqs"], "context": sizes["context"], "chunk_tokens": sizes["chunk_tokens"],
        "family": runner.config.family,
    }  # fmt: skip
    if missing := [name for name in ("target", *here) if name not in result]:
        raise ConfigError(
            f"the compile result has no {', '.join(missing)}, so it cannot be compared with this map: it is of another "
            f"version of jaxmoe; write it again with jaxmoe compile --json"
        )
    for name, value in here.items():
        if result[name] != value:
            raise ConfigError(
                f"the compile result has {name}={_shown(result[name])}, this map has {name}={_shown(value)}: "
                f"make {_OPTIONS[name]} equal"
            )


def _shown(value: Any) -> str:
    return ",".join(f"{axis}={size}" for axis, size in value.items()) if isinstance(value, dict) else str(value)


def compared(steps: Mapping[str, Any], result: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """List every collective of each step with its planned and compiled counts.

    The compiled count is None if that step was not compiled.
    """
    rows: list[dict[str, Any]] = []
    for phase, step in steps.items():
        planned: Counter[tuple[Any, ...]] = Counter()
        sent: dict[tuple[Any, ...], float] = {}
        locations: dict[tuple[Any, ...], list[str]] = {}
        for site in step["sites"]:
            key = site["op"], tuple(site["axes"]), site["bytes"]
            planned[key] += site["count"]
            sent[key] = site["sent"]
            if site["location"] not in (names := locations.setdefault(key, [])):
                names.append(site["location"])
        compiled: Counter[tuple[Any, ...]] = Counter()
        there = False
        for row in result["collectives"] if result else ():
            if row["phase"] == phase:
                there = True
                compiled[row["op"], tuple(row["axes"]), row["bytes"]] += row["count"]
        keys = list(planned) + sorted((key for key in compiled if key not in planned and compiled[key]), key=str)
        rows += [
            {"phase": phase, "op": op, "axes": list(axes), "bytes": size, "sent": sent.get((op, axes, size)),
             "location": locations.get((op, axes, size), []),
             "planned": planned[op, axes, size], "compiled": compiled[op, axes, size] if there else None}
            for op, axes, size in keys
        ]  # fmt: skip
    return rows

"""Paths as a person writes them."""

from __future__ import annotations

from pathlib import Path

from .errors import JaxmoeError


def expanded(path: str | Path, what: str, error: type[JaxmoeError]) -> Path:
    """With ~ as the home it means. Raises: error naming what the path was to be, where nobody of that name has one."""
    try:
        return Path(path).expanduser()
    except RuntimeError as cause:
        raise error(f"{what} {str(path)!r} is no path: {cause}") from cause

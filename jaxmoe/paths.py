"""File paths as users write them."""

from __future__ import annotations

from pathlib import Path

from .errors import JaxmoeError


def expanded(path: str | Path, what: str, error: type[JaxmoeError]) -> Path:
    """Return path with a leading ~ expanded to a home directory.

    Raises: error, with `what` as the name of the path, if ~user names an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as cause:
        raise error(f"{what} {str(path)!r} is not a valid path: {cause}") from cause

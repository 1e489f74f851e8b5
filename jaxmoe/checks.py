"""Checks of values from outside, and the error where one fails."""

from __future__ import annotations

import math
from typing import Any


def require(error: type[Exception], condition: bool, message: str) -> None:
    """Raise an error with this message unless the condition holds."""
    if not condition:
        raise error(message)


def is_finite(value: Any, *, below: float = math.inf) -> bool:
    """Return whether a value is a number of magnitude under `below` that a float can represent; bools are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and abs(value) < below
    except OverflowError:
        return False


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode. JSON escapes can produce lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

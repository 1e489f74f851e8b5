"""The package's exceptions. Each is also a ValueError, so callers may catch either."""

from __future__ import annotations

from collections.abc import Sequence


class JaxmoeError(ValueError):
    """Base of every error a person can cause and mend: one line with the name, value, limit and remedy."""


class ConfigError(JaxmoeError):
    """A model config is unknown, contradictory, or holds a key that changes the maths and is not supported."""


class MeshError(JaxmoeError):
    """A mesh names an unknown axis, or its axes do not multiply to the number of devices."""


class LayoutError(JaxmoeError):
    """A layout names an unknown axis, uses one twice, or leaves one without work."""


class CheckpointError(JaxmoeError):
    """A checkpoint is missing, truncated, corrupt, or its keys and shapes differ from what the model needs."""


class MissingWeightsError(CheckpointError):
    """A checkpoint directory has no weights that can be read, or not all of their files."""


class RequestError(JaxmoeError):
    """A prompt or a sampling value lies outside what the model or the engine accepts."""


class StepError(JaxmoeError):
    """A step of the engine failed on the devices and the requests in it ended, or the logits of one request are not
    finite and it alone ended; the engine goes on."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of names that a file gave, and how many more there are; quoted where a terminal would not show them."""
    shown = [name[:200] if name[:200].isprintable() else repr(name[:200]) for name in names[:most]]
    return ", ".join(shown) + (f", and {len(names) - most} more" if len(names) > most else "")

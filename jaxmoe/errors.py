"""Exceptions of the package. Each is also a ValueError, so callers may catch either."""

from __future__ import annotations

from collections.abc import Sequence


class JaxmoeError(ValueError):
    """Base class of all errors that a user can cause and fix.

    The message is one line with the name, the value, the limit and the remedy.
    """


class ConfigError(JaxmoeError):
    """Raised if a model config is unknown, contradictory, or has a key that changes the math and is not supported."""


class MeshError(JaxmoeError):
    """Raised if a mesh names an unknown axis, or if its axes do not multiply to the number of devices."""


class LayoutError(JaxmoeError):
    """Raised if a layout names an unknown axis, uses an axis twice, or leaves one unused."""


class CheckpointError(JaxmoeError):
    """Raised if a checkpoint is missing, truncated or corrupt, or if its keys and shapes do not match the model."""


class MissingWeightsError(CheckpointError):
    """Raised if a checkpoint directory has no readable weights or lacks some of its weight files."""


class RequestError(JaxmoeError):
    """Raised if a prompt or a sampling parameter exceeds the limits of the model or the engine."""


class StepError(JaxmoeError):
    """Raised if an engine step fails on the devices, or if logits are not finite. The engine continues.

    A failed step ends all requests in it. Logits that are not finite end their own request only.
    """


class ProcessLostError(StepError):
    """Raised if another of the joined processes died, hangs or cannot be reached. This process ends shortly after."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first `most` names as text, followed by the number of remaining names.

    Each name is cut to 200 characters and quoted if it is not printable.
    """
    shown = [name[:200] if name[:200].isprintable() else repr(name[:200]) for name in names[:most]]
    return ", ".join(shown) + (f", and {len(names) - most} more" if len(names) > most else "")

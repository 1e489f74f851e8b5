"""The causal attention mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Describe the causal attention mask and the scale of attention scores.

    scale: factor of the scores. window: a query sees only the last `window` tokens up to its own. chunk: a query sees
    only tokens of its own chunk of `chunk` positions. None disables either limit.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None

    def mask(self, query_at: Array, key_at: Array) -> Array:
        """Return whether queries at positions query_at may see keys at positions key_at."""
        distance = query_at - key_at
        allowed = distance >= 0
        if self.window is not None:
            allowed &= distance < self.window
        if self.chunk is not None:
            allowed &= query_at // self.chunk == key_at // self.chunk
        return allowed

    @property
    def is_full_causal(self) -> bool:
        """Return whether a query sees all tokens up to its own."""
        return self.window is None and self.chunk is None

    def first_visible(self, query_at: Any) -> Any:
        """Return the first position that a query at query_at (an int or an array) sees."""
        first = 0 * query_at if self.window is None else query_at - self.window + 1
        if self.chunk is not None:
            return _larger(first, query_at // self.chunk * self.chunk)
        return _larger(first, 0)


def _larger(one: Any, other: Any) -> Any:
    return max(one, other) if isinstance(one, int) else jnp.maximum(one, other)

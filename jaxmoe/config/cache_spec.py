"""LayerCacheSpec: the KV cache of one layer, and how far back the layer attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerCacheSpec:
    """Describe the KV cache of one layer.

    head_dims: sizes of the vectors cached per token and head slot: a key and a value, or the latent alone, whose first
    numbers are the value. window: the layer attends to at most the last `window` tokens. attention_chunk: it attends to
    at most the tokens of its own chunk of this many positions. 0: no limit.
    """

    head_dims: tuple[int, ...]
    window: int = 0
    attention_chunk: int = 0

    @property
    def is_windowed(self) -> bool:
        """Return whether pages of a running request fall out of the layer's sight."""
        return bool(self.window or self.attention_chunk)

    @property
    def span(self) -> int | None:
        """Return the most tokens that the layer attends to; None without a limit."""
        return min((limit for limit in (self.window, self.attention_chunk) if limit), default=None)

    @property
    def numbers_per_head(self) -> int:
        """Return the elements cached per token and head slot."""
        return sum(self.head_dims)

    def bytes_per_head(self, itemsize: int, scale_bytes: int = 0) -> int:
        """Return the bytes per token and head slot; scale_bytes: of each vector, if its elements are quantized."""
        return sum(dim * itemsize + scale_bytes for dim in self.head_dims)

    def first_visible(self, position: int) -> int:
        """Return the first position that the token at `position` or any later one attends to."""
        return max(first_positions(position, self.window, self.attention_chunk), default=0)

    def max_pages(self, num_tokens: int, *, page_size: int, chunk_tokens: int) -> int:
        """Return the most pages that a request of num_tokens holds at once, if prompts are run chunk_tokens at a time.

        A windowed layer releases pages that no later token attends to.
        """
        return pages_at_once(num_tokens, self.span, page_size=page_size, chunk_tokens=chunk_tokens)


def first_positions(position: int, window: int, attention_chunk: int) -> list[int]:
    """Return the first positions that the token at `position` or any later one attends to, one for each limit."""
    firsts = []
    if window:
        firsts.append(max(0, position - window + 1))
    if attention_chunk:
        firsts.append(position // attention_chunk * attention_chunk)
    return firsts


def pages_at_once(num_tokens: int, span: int | None, *, page_size: int, chunk_tokens: int) -> int:
    """Return the most pages that a request holds at once, of layers that attend to at most `span` tokens (None: all).

    Prompts are run chunk_tokens at a time.
    """
    pages = -(-num_tokens // page_size)
    if span is None:
        return pages
    together = span - 1 + chunk_tokens  # visible before a chunk, plus the chunk
    return min(pages, (together + page_size - 2) // page_size + 1)


def cache_groups(specs: Sequence[LayerCacheSpec]) -> dict[LayerCacheSpec, list[int]]:
    """Return the layers of each kind of cache, in the order of their first layers.

    Layers of one kind can share a block table: they hold and release the same pages.
    """
    groups: dict[LayerCacheSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        groups.setdefault(spec, []).append(layer)
    return groups

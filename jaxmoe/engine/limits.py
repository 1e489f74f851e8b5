"""Scheduler configuration of one rank of the batch, and the pages that a request needs. No arrays, no device."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmoe.config.cache_spec import first_positions, pages_at_once


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Configure the scheduler and the KV cache of one rank of the batch. num_ranks: number of these ranks.

    max_num_seqs: maximum number of sequences that run at once. chunk_tokens: maximum number of prompt tokens per step,
    in blocks of block_tokens tokens of one request each. num_pages, num_host_pages: pages of page_size tokens on the
    device and in host memory. context: maximum number of tokens of a request. decode_steps: maximum number of tokens
    that a request decodes in one step while no prompt waits. aging_steps: steps of age that compensate for one step of
    priority.

    window, attention_chunk: sliding window and attention chunk of the layers, in tokens. Every layer attends at most to
    the last `window` tokens, or to its own chunk of attention_chunk positions, whichever reaches further back. 0 if no
    layer has such a limit; both are 0 if any layer has full attention.

    Raises: ValueError if a value is out of range or chunk_tokens is not a multiple of block_tokens.
    """

    num_ranks: int
    max_num_seqs: int
    chunk_tokens: int
    block_tokens: int
    num_pages: int
    page_size: int
    context: int
    num_host_pages: int = 0
    decode_steps: int = 1
    aging_steps: int = 256
    window: int = 0
    attention_chunk: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("num_host_pages", "window", "attention_chunk") else 1
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.chunk_tokens % self.block_tokens:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be a multiple of block_tokens={self.block_tokens}")

    def joined(self, other: SchedulerConfig) -> SchedulerConfig:
        """Return the element-wise maximum of both configurations."""
        return SchedulerConfig(**{name: max(value, getattr(other, name)) for name, value in vars(self).items()})

    def max_total(self, num_prompt: int, max_new: int | None, *, keeps_all: bool = False) -> int:
        """Return the maximum number of tokens of a request, prompt included.

        max_new: maximum number of new tokens, limited by the context; by default as many as the context and the pages
        of one rank allow. keeps_all: whether the request releases no page before it ends.
        """
        if max_new is not None:
            return max(num_prompt, min(self.context, num_prompt + max_new))
        fits = self.max_pages(self.context, keeps_all=keeps_all) <= self.num_pages
        return max(num_prompt, self.context if fits else min(self.context, self.pool_tokens))

    @property
    def pool_tokens(self) -> int:
        """Return the number of tokens that the pages of one rank hold."""
        return self.num_pages * self.page_size

    @property
    def frees_pages(self) -> bool:
        """Return whether running requests release pages that no layer attends to any more."""
        return bool(self.window or self.attention_chunk)

    def first_visible(self, position: int) -> int:
        """Return the first position that the token at `position` or any later one attends to in any layer."""
        return min(first_positions(position, self.window, self.attention_chunk), default=0)

    def max_pages(self, num_tokens: int, *, keeps_all: bool = False) -> int:
        """Return the most pages that a request of num_tokens holds at once. keeps_all: as in max_total."""
        span = None if keeps_all or not self.frees_pages else max(self.window, self.attention_chunk)
        return pages_at_once(num_tokens, span, page_size=self.page_size, chunk_tokens=self.chunk_tokens)

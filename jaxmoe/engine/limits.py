"""What one rank of the batch can take, and what pages a request needs of it. Pure numbers: no arrays, no device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Scheduler and cache configuration of one rank of the batch, and the number of ranks.

    max_num_seqs: sequences that run at once. chunk_tokens: prompt tokens a step, in blocks of block_tokens of one
    request each. num_pages pages of page_size tokens, and num_host_pages more in host memory. context: tokens of a
    request at most. decode_steps: tokens that a request may decode in one step, where no prompt waits. aging_steps:
    steps of age that make up for one step of priority. window, attention_chunk: no layer sees more than the last
    `window` tokens, or than those of its own chunk of so many positions, whichever reaches further back; 0 where no
    layer is so limited, both 0 where some layer sees all.
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
        """Return the most tokens of a request, prompt included.

        max_new: new tokens at most, within the context; None for as many as the context and the pages of one rank hold.
        keeps_all: whether the request gives no page back before it ends.
        """
        if max_new is not None:
            return max(num_prompt, min(self.context, num_prompt + max_new))
        fits = self.max_pages(self.context, keeps_all=keeps_all) <= self.num_pages
        return max(num_prompt, self.context if fits else min(self.context, self.pool_tokens))

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pages of one rank hold."""
        return self.num_pages * self.page_size

    @property
    def frees_pages(self) -> bool:
        """Whether pages of a request that runs come to lie behind what any layer sees."""
        return bool(self.window or self.attention_chunk)

    def first_visible(self, position: int) -> int:
        """The first position that the token at `position`, or any after it, sees in some layer."""
        firsts = []
        if self.window:
            firsts.append(max(0, position - self.window + 1))
        if self.attention_chunk:
            firsts.append(position // self.attention_chunk * self.attention_chunk)
        return min(firsts, default=0)

    def max_pages(self, num_tokens: int, *, keeps_all: bool = False) -> int:
        """The most pages that a request of num_tokens needs at once. keeps_all: whether it gives none back early."""
        pages = -(-num_tokens // self.page_size)
        if keeps_all or not self.frees_pages:
            return pages
        together = max(self.window, self.attention_chunk) - 1 + self.chunk_tokens  # seen before a chunk, and its own
        return min(pages, (together + self.page_size - 2) // self.page_size + 1)

"""The scheduler: decide which tokens of which requests the next step computes. Uses no arrays, no device and no clock.

Every rank of the batch has sequence slots, a page pool and a budget of prompt tokens per step. A request that has
computed its prompt decodes in every step. Prompts are computed in chunks within the budget (chunked prefill), so that a
long prompt does not stall the decoding requests. If the pages run out, the least urgent request, and among equals the
latest arrival, is preempted: it releases its pages and is computed again later. The most urgent request is never
preempted for another, so every request finishes.

If every layer has a sliding window or chunked attention, a request releases the pages that its later tokens do not
attend to. It then holds only the pages of one window and one prompt chunk.

The host runs ahead of the devices: it plans a step before the tokens of the previous step are known. `complete` appends
them later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxmoe.cache.pages import PageCopy, PagePool
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.errors import RequestError


@dataclass(eq=False, kw_only=True)
class ScheduledSequence:
    """Hold the tokens of one sequence and its scheduling state.

    tokens: prompt and generated tokens known so far. max_total: maximum number of tokens, prompt included. keeps_all:
    whether the sequence needs the token ids of all its pages, so that it releases no page before it ends.
    awaits_tokens: whether its next token is planned only when all tokens before it are known. deadline: time at which
    it expires. arrival: order of submission. queued_at: number of the step at which it was queued.
    """

    request_id: int
    tokens: list[int]
    max_total: int
    keeps_all: bool = False
    awaits_tokens: bool = False
    priority: int = 0
    deadline: float | None = None
    arrival: int = 0
    queued_at: int = 0
    rank: int = -1
    slot: int = -1
    pages: list[int] = field(default_factory=list)  # -1 for the first num_behind pages, which were released
    num_behind: int = 0
    num_written: int = 0  # tokens with keys and values in pages once the steps planned so far are done
    num_pending: int = 0  # tokens that the steps planned so far will sample
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_cached_pages: int = 0  # pages, from the first, that are in the prefix cache
    decoding: bool = False  # whether its whole prompt is planned, so that it decodes from now on
    finished: bool = False

    @property
    def num_total(self) -> int:
        """Return the number of tokens, including pending ones of planned steps."""
        return len(self.tokens) + self.num_pending


@dataclass(frozen=True, kw_only=True)
class PromptChunk:
    """Describe prompt tokens [start, start + count) of a sequence.

    last: whether a token is sampled after them. num_sampled: number of its last tokens, at most count, after each of
    which a token is sampled, if `last`.
    """

    sequence: ScheduledSequence
    start: int
    count: int
    last: bool
    num_sampled: int = 1


@dataclass(frozen=True, kw_only=True)
class DecodeTokens:
    """Describe `count` consecutive decode steps of a sequence. The first one reads the token at position `start`."""

    sequence: ScheduledSequence
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Describe the work of one step: tokens of decoding sequences, and prompt chunks.

    With prompt chunks, every decoding sequence decodes one token. page_copies: (rank, copy) to or from host memory, to
    be run in this order before the step.
    """

    decodes: list[DecodeTokens]
    chunks: list[PromptChunk]
    page_copies: list[tuple[int, PageCopy]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def decode_steps(self) -> int:
        """Return the number of decode steps: the most tokens that any sequence decodes."""
        return max((decode.count for decode in self.decodes), default=1)

    def sampled(self) -> Iterator[tuple[ScheduledSequence, int]]:
        """Yield (sequence, number of sampled tokens), in the order of `decodes` and then of `chunks`."""
        yield from ((decode.sequence, decode.count) for decode in self.decodes)
        yield from ((chunk.sequence, chunk.num_sampled) for chunk in self.chunks if chunk.last)

    def sequences(self) -> Iterator[ScheduledSequence]:
        """Yield every sequence of the step once."""
        parts = [decode.sequence for decode in self.decodes] + [chunk.sequence for chunk in self.chunks]
        yield from {id(sequence): sequence for sequence in parts}.values()


class StepScheduler:
    """Schedule waiting and running requests, and plan each step."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.offloads_pages = True
        self.pools = [self._new_pool() for _ in range(config.num_ranks)]
        self.waiting: list[ScheduledSequence] = []
        self.running: list[ScheduledSequence] = []
        self._free_slots = [list(range(config.max_num_seqs - 1, -1, -1)) for _ in range(config.num_ranks)]
        self._arrivals = self._evicted_before = self._swapped_in_before = 0
        self.num_steps = self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = 0

    @property
    def num_evicted(self) -> int:
        """Return the number of cached pages evicted since the start."""
        return self._evicted_before + sum(pool.num_evicted for pool in self.pools)

    @property
    def num_swapped_in(self) -> int:
        """Return the number of pages swapped in from host memory since the start."""
        return self._swapped_in_before + sum(pool.num_swapped_in for pool in self.pools)

    def _new_pool(self) -> PagePool:
        config = self.config
        host_pages = config.num_host_pages if self.offloads_pages else 0
        return PagePool(
            num_pages=config.num_pages, page_size=config.page_size, num_host_pages=host_pages,
            first_visible=config.first_visible if config.frees_pages else None,
        )  # fmt: skip

    def enable_offload(self, enabled: bool) -> None:
        """Set whether evicted pages are offloaded to host memory. No sequence may be running."""
        self.offloads_pages = enabled
        self.reset_prefix_cache()

    # --- requests ---

    def check(self, num_prompt: int, max_total: int, *, keeps_all: bool = False) -> None:
        """Raise RequestError if a request of this size could never run to its end."""
        config = self.config
        if max_total > config.context:
            raise RequestError(
                f"prompt of {num_prompt} tokens + {max_total - num_prompt} new ones is {max_total} tokens, the context "
                f"holds {config.context}: shorten the prompt or lower max_tokens"
            )
        needed = config.max_pages(max_total, keeps_all=keeps_all)
        if needed > config.num_pages:
            at_once = f", {needed} pages at once" if needed * config.page_size < max_total else ""
            raise RequestError(
                f"prompt of {num_prompt} tokens + {max_total - num_prompt} new ones is {max_total} tokens{at_once}, "
                f"the pool holds {config.pool_tokens} ({config.num_pages} pages of {config.page_size}): lower "
                f"max_tokens or give the pool more memory"
            )

    def add(self, sequence: ScheduledSequence) -> None:
        """Queue a sequence. Raises: RequestError if it can never fit."""
        self.check(len(sequence.tokens), sequence.max_total, keeps_all=sequence.keeps_all)
        sequence.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        sequence.queued_at = self.num_steps
        self.waiting.append(sequence)

    def finish(self, sequence: ScheduledSequence, *, discard: bool = False) -> None:
        """End a sequence in any state: release its pages and ignore its pending tokens.

        discard: whether to remove its pages from the prefix cache, so that later prompts do not match them.
        """
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self.running:
            pool, pages = self.pools[sequence.rank], sequence.pages
            self._leave(sequence)
            if discard:
                pool.discard(pages)
        else:
            self.waiting.remove(sequence)
            for pool in self.pools if discard else ():  # pages that a preempted sequence left in the prefix cache
                pool.discard_prefix(sequence.tokens)

    def _leave(self, sequence: ScheduledSequence) -> None:
        self.running.remove(sequence)
        self._free_slots[sequence.rank].append(sequence.slot)
        self._free_slots[sequence.rank].sort(reverse=True)  # use low slots first, so that a small bucket suffices
        self.pools[sequence.rank].decref(sequence.pages)
        sequence.pages, sequence.num_written, sequence.slot, sequence.rank = [], 0, -1, -1
        sequence.decoding, sequence.num_cached_pages, sequence.num_behind = False, 0, 0

    def expired(self, now: float) -> list[ScheduledSequence]:
        """Return the sequences whose deadline has passed. The caller finishes them."""
        return [s for s in (*self.running, *self.waiting) if s.deadline is not None and s.deadline <= now]

    # --- planning a step ---

    def plan(self) -> StepPlan:
        """Plan the next step. The plan is empty if no token can be computed before pending tokens are known."""
        self.num_steps += 1
        self.running.sort(key=self._urgency)
        for sequence in self.running:
            self._free_behind(sequence)
        ready = [sequence for sequence in list(self.running) if self._make_room(sequence)]
        ready = [sequence for sequence in ready if sequence.slot >= 0]  # drop sequences preempted for another
        chunks = self._plan_chunks()
        decode_steps = 1 if chunks or self.waiting else self.config.decode_steps
        decodes = [self._plan_decode(sequence, decode_steps) for sequence in ready]
        if not decodes and not chunks:
            return StepPlan(decodes=[], chunks=[])
        return StepPlan(decodes=decodes, chunks=chunks, page_copies=self._take_page_copies())

    def _take_page_copies(self) -> list[tuple[int, PageCopy]]:
        page_copies = [(rank, page_copy) for rank, pool in enumerate(self.pools) for page_copy in pool.pending_copies]
        for pool in self.pools:
            pool.pending_copies.clear()
        return page_copies

    def _urgency(self, sequence: ScheduledSequence) -> tuple[int, int]:
        """Return the sort key of a sequence: the lowest is served first and preempted last.

        Age compensates for low priority (a high value): one step of priority for every aging_steps steps. Age also
        grows while a sequence runs, so that a preempted sequence keeps the urgency with which it was admitted.
        """
        age = self.num_steps - sequence.queued_at
        return sequence.priority - age // self.config.aging_steps, sequence.arrival

    def _free_behind(self, sequence: ScheduledSequence) -> None:
        """Release the pages that no later token of the sequence attends to.

        Steps in flight may still read them: devices run steps in order, so any step that rewrites them comes later.
        """
        if sequence.keeps_all or not self.config.frees_pages:
            return
        behind = min(self.config.first_visible(sequence.num_written) // self.config.page_size, len(sequence.pages))
        if behind > sequence.num_behind:
            freed = slice(sequence.num_behind, behind)
            self.pools[sequence.rank].decref(sequence.pages[freed])
            sequence.pages[freed] = [-1] * (behind - sequence.num_behind)
            sequence.num_behind = behind

    def _prompt_pages(self, sequence: ScheduledSequence) -> int:
        """Return the number of pages, including released ones, that a sequence needs for its next prompt chunk."""
        config, num_tokens = self.config, len(sequence.tokens)
        most = config.max_pages(num_tokens, keeps_all=sequence.keeps_all)
        return min(-(-num_tokens // config.page_size), sequence.num_behind + most)

    def _make_room(self, sequence: ScheduledSequence) -> bool:
        """Allocate pages for the next token or prompt chunk of a running sequence, and return whether it decodes now.

        Preempts less urgent sequences of its rank, and at last the sequence itself, if pages run out.
        """
        if sequence.slot < 0 or (sequence.decoding and sequence.num_total >= sequence.max_total):
            return False
        if sequence.awaits_tokens and sequence.num_pending:
            return False
        needed = self._prompt_pages(sequence)
        if sequence.decoding:
            needed = sequence.num_written // self.config.page_size + 1
        while len(sequence.pages) < needed:
            page = self.pools[sequence.rank].allocate(1)
            if page is not None:
                sequence.pages += page
                continue
            victim = max((s for s in self.running if s.rank == sequence.rank), key=self._urgency)
            self._preempt(victim)
            if victim is sequence:
                return False
        return sequence.decoding

    def _plan_decode(self, sequence: ScheduledSequence, decode_steps: int) -> DecodeTokens:
        """Plan up to decode_steps tokens of a sequence, as far as pages suffice.

        Further pages are allocated only while more are available than sequences run, as each may need one.
        """
        pool, size = self.pools[sequence.rank], self.config.page_size
        wanted = min(1 if sequence.awaits_tokens else decode_steps, sequence.max_total - sequence.num_total)
        while len(sequence.pages) * size < sequence.num_written + wanted and pool.num_available > len(self.running):
            sequence.pages += pool.allocate(1) or []
        start = sequence.num_written
        count = min(wanted, len(sequence.pages) * size - start)
        sequence.num_written += count
        sequence.num_pending += count
        return DecodeTokens(sequence=sequence, start=start, count=count)

    def _preempt(self, sequence: ScheduledSequence) -> None:
        self._leave(sequence)
        self.num_preemptions += 1
        self.waiting.append(sequence)

    def _plan_chunks(self) -> list[PromptChunk]:
        blocks_left = [self.config.chunk_tokens // self.config.block_tokens] * self.config.num_ranks
        chunks = []
        for sequence in list(self.running):
            if not sequence.decoding:
                chunks += self._plan_chunk(sequence, blocks_left)
        for sequence in sorted(self.waiting, key=self._urgency):
            if sequence.num_pending:  # preempted, and a sampled token is still pending
                continue
            if not any(blocks_left) or not self._admit(sequence, blocks_left):
                break  # strict order, so that a large request is admitted eventually
            chunks += self._plan_chunk(sequence, blocks_left)
        return chunks

    def _admit(self, sequence: ScheduledSequence, blocks_left: Sequence[int]) -> bool:
        """Admit a waiting sequence if a rank has a free slot, prompt budget and enough pages; return whether one has.

        Chooses the rank with the longest cached prefix. Allocates pages for all tokens of the sequence, or for the most
        that it holds at once.
        """
        tokens, size = sequence.tokens, self.config.page_size
        limit, whole = len(tokens) - 1, sequence.keeps_all
        choices = []
        for rank, pool in enumerate(self.pools):
            prefix = pool.match_prefix(tokens, limit=limit, whole=whole)
            sequence.num_behind = prefix.num_behind
            new = self._prompt_pages(sequence) - prefix.num_behind - len(prefix.on_device)
            spare = pool.num_available - pool.num_evictable_of(prefix.on_device) - new
            if self._free_slots[rank] and blocks_left[rank] and spare >= 0:
                choices.append((prefix.num_pages, spare, -rank, prefix.num_behind))
        sequence.num_behind = 0
        if not choices:
            return False
        _, _, minus_rank, sequence.num_behind = max(choices)
        rank = -minus_rank
        pool = self.pools[rank]
        known = pool.acquire_prefix(tokens, limit=limit, whole=whole)
        taken = pool.allocate(self._prompt_pages(sequence) - len(known))
        assert taken is not None
        sequence.rank, sequence.slot, sequence.pages = rank, self._free_slots[rank].pop(), known + taken
        sequence.num_written = sequence.num_cached_tokens = len(known) * size
        sequence.num_cached_pages = len(known)
        self.num_prompt_tokens += len(tokens)
        self.num_cached_tokens += sequence.num_cached_tokens
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _plan_chunk(self, sequence: ScheduledSequence, blocks_left: list[int]) -> list[PromptChunk]:
        size = self.config.block_tokens
        start, total = sequence.num_written, len(sequence.tokens)
        count = min(
            total - start, blocks_left[sequence.rank] * size, len(sequence.pages) * self.config.page_size - start
        )
        if count <= 0:
            return []
        blocks_left[sequence.rank] -= -(-count // size)
        sequence.num_written += count
        if sequence.num_written == total:
            sequence.decoding, sequence.num_pending = True, 1
        self._insert_prefix(sequence, sequence.num_written, replace=False)
        return [PromptChunk(sequence=sequence, start=start, count=count, last=sequence.decoding)]

    # --- outputs of steps ---

    def complete(self, plan: StepPlan, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[ScheduledSequence, int, int]]:
        """Append the sampled tokens of a step and yield (sequence, index, token).

        tokens: one list per entry of plan.sampled(); `index` is the index of the entry. Tokens of finished sequences
        are dropped. The caller may finish a sequence before it takes the next token. Full pages of known tokens are
        inserted into the prefix cache.
        """
        for index, ((sequence, _), sampled) in enumerate(zip(plan.sampled(), tokens, strict=True)):
            for token in sampled:
                if sequence.finished:
                    break
                sequence.num_pending -= 1
                sequence.tokens.append(token)
                self._insert_prefix(
                    sequence, min(len(sequence.tokens) - 1, sequence.num_written - sequence.num_pending)
                )
                yield sequence, index, token
        for sequence in plan.sequences():
            self._insert_prefix(sequence, min(len(sequence.tokens) - 1, sequence.num_written - sequence.num_pending))

    def _insert_prefix(self, sequence: ScheduledSequence, known: int, *, replace: bool = True) -> None:
        """Insert the full pages of the first `known` tokens of a sequence into the prefix cache.

        Steps in flight count as done. Devices run steps in order, so a request that matches the pages reads them later,
        or in the same step, which writes before it reads. If a step fails, the prefix cache is reset.
        """
        full = known // self.config.page_size
        if sequence.slot >= 0 and full > sequence.num_cached_pages:
            pool = self.pools[sequence.rank]
            sequence.num_cached_pages = pool.insert_prefix(
                sequence.pages, sequence.tokens, start=sequence.num_cached_pages, stop=full, replace=replace
            )

    def fail(self, plan: StepPlan, fault: Callable[[ScheduledSequence], None]) -> None:
        """Handle a failed step: end its sequences, preempt all others, and reset the prefix cache.

        fault: called with each sequence of the step.
        """
        for sequence in plan.sequences():
            if not sequence.finished:
                self.finish(sequence)
                fault(sequence)
        for sequence in list(self.running):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.num_pending = 0
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Drop the prefix cache and free all pages. No sequence may be running."""
        assert not self.running
        self._evicted_before, self._swapped_in_before = self.num_evicted, self.num_swapped_in
        self.pools = [self._new_pool() for _ in range(self.config.num_ranks)]

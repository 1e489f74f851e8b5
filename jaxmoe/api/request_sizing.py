"""Size the scheduler and the KV cache of LLM.generate by its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxmoe.config.engine import MAX_DECODE_STEPS, PAGE_SIZE
from jaxmoe.engine.batch import whole_blocks
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.runner import ModelRunner, bucket

_CHUNK_TOKENS = (128, 512, 2048)  # prompt tokens per step and rank
_OPEN_TOKENS = 1024  # new tokens to allocate pages for, per request without max_tokens


def size_for_requests(
    runner: ModelRunner, inputs: Sequence[tuple[Sequence[int], SamplingParams]], *, max_num_seqs: int,
    present: SchedulerConfig | None,
) -> SchedulerConfig:  # fmt: skip
    """Return a configuration that fits these requests and is at least as large as the present one.

    inputs: token ids and sampling parameters of each request. max_num_seqs: over all ranks of the batch.
    """
    context, ranks = runner.config.max_position_embeddings, runner.num_ranks
    longest = max(context if p.max_tokens is None else min(context, len(ids) + p.max_tokens) for ids, p in inputs)
    expected = max(min(context, len(ids) + (p.max_tokens or _OPEN_TOKENS)) for ids, p in inputs)
    seq_slots = runner.padded_num_seqs(min(sum(p.n for _, p in inputs), max_num_seqs)) // ranks
    length = min(bucket(longest), context)
    share = -(-sum(len(ids) for ids, _ in inputs) // ranks)
    chunk_tokens = next((n for n in _CHUNK_TOKENS if n >= share), _CHUNK_TOKENS[-1])
    chunk_tokens, block_tokens = whole_blocks(chunk_tokens, runner.block_shares)
    needed = SchedulerConfig(
        num_ranks=ranks,
        max_num_seqs=seq_slots,
        block_tokens=block_tokens,
        context=length,
        page_size=PAGE_SIZE * runner.context_ranks,
        decode_steps=MAX_DECODE_STEPS,
        chunk_tokens=chunk_tokens,
        num_pages=1,
        window=runner.config.visible_span[0],
        attention_chunk=runner.config.visible_span[1],
    )
    keeps_all = any(p.reads_history for _, p in inputs)
    whole = needed if present is None else needed.joined(present)  # larger chunks need more pages
    usual, most = (whole.max_pages(n, keeps_all=keeps_all) for n in (min(bucket(expected), length), length))
    return replace(whole, num_pages=max(whole.num_pages, seq_slots * usual, most))

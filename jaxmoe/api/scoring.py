"""Score whole prompts in batches: the log-probability of every token, and the logits after the last one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxmoe.engine.runner import bucket
from jaxmoe.engine.worker import ModelExecutor

_MAX_PREFILL_TOKENS = 65536  # tokens of one batch


def score_batches(
    executor: ModelExecutor, prompts: Sequence[list[int]], *, max_num_seqs: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each prompt of T ids its log-probabilities [T - 1] and the logits [V] after its last token, float32."""
    longest = max(len(ids) for ids in prompts)
    size = max(1, min(max_num_seqs, _MAX_PREFILL_TOKENS // longest))
    for first in range(0, len(prompts), size):
        group = prompts[first : first + size]
        tokens, lengths = pad_prompts(group, executor.runner.padded_num_seqs(len(group)))
        logprobs, logits = executor.score(tokens, lengths)
        for row, ids in enumerate(group):
            yield logprobs[row, : len(ids) - 1], logits[row]


def pad_prompts(prompts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [rows, bucket], right-padded with 0, and lengths [rows]."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(ids) for ids in prompts]
    tokens = np.zeros((rows, bucket(max(len(ids) for ids in prompts))), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return tokens, lengths

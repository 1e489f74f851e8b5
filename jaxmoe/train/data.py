"""Yield batches of token windows for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxmoe.errors import ConfigError


def batches(stream: np.ndarray, *, batch_rows: int, window_tokens: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of windows [batch_rows, window_tokens + 1] of a token stream without end.

    Consecutive windows overlap by one token. Every pass over the stream uses a new offset and a new order of windows,
    both determined by seed. Raises: ConfigError if the stream does not fill one batch.
    """
    rng = np.random.default_rng(seed)
    left = np.empty((0, window_tokens + 1), stream.dtype)
    if (len(stream) - 1) // window_tokens < batch_rows + 1:
        raise ConfigError(
            f"the corpus has {len(stream)} tokens, less than {batch_rows + 1} windows of {window_tokens}: "
            "use fewer rows"
        )
    while True:
        first = int(rng.integers(window_tokens))
        starts = np.arange(first, len(stream) - window_tokens, window_tokens)
        rng.shuffle(starts)
        windows = np.concatenate([left, stream[starts[:, None] + np.arange(window_tokens + 1)]])
        full = len(windows) // batch_rows * batch_rows
        yield from windows[:full].reshape(-1, batch_rows, window_tokens + 1)
        left = windows[full:]


def evaluation_batches(
    stream: np.ndarray, *, batch_rows: int, window_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield windows [batch_rows, window_tokens + 1] in order, with their numbers of targets [batch_rows].

    Every token of the stream except the first is a target exactly once.
    """
    num_targets = len(stream) - 1
    starts = np.arange(0, num_targets, window_tokens)
    padded = np.concatenate([stream, np.zeros(window_tokens, stream.dtype)])
    for first in range(0, len(starts), batch_rows):
        rows = starts[first : first + batch_rows]
        lengths = np.zeros(batch_rows, np.int32)
        lengths[: len(rows)] = np.minimum(num_targets - rows, window_tokens)
        tokens = np.zeros((batch_rows, window_tokens + 1), stream.dtype)
        tokens[: len(rows)] = padded[rows[:, None] + np.arange(window_tokens + 1)]
        yield tokens, lengths

"""One batch of requests from prompt to last token: prefill, then decode steps, the host one step behind the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxmoe.engine.request import Chunk, RequestOutput, SamplingParams
from jaxmoe.engine.runner import Runner, bucket
from jaxmoe.engine.tokenizer import TextStream, Tokenizer


@dataclass(kw_only=True)
class Running:
    """One request while it runs."""

    index: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def push(self, token: int, logprob: float, eos: frozenset[int]) -> Chunk:
        """Take one new token; decides whether it was the last."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in eos and not self.params.ignore_eos:
            self.finish_reason, text = "stop", self.stream.finish()
        else:
            text = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) >= self.limit:
                self.finish_reason, text = "length", text + self.stream.finish()
        return Chunk(index=self.index, token_id=token, logprob=logprob, text=text, finish_reason=self.finish_reason)

    def output(self) -> RequestOutput:
        """The finished request."""
        assert self.finish_reason is not None
        return RequestOutput(
            index=self.index, prompt_token_ids=self.prompt, token_ids=self.token_ids, logprobs=self.logprobs,
            text=self.stream.text, finish_reason=self.finish_reason,
        )  # fmt: skip


def start(
    prompts: Sequence[tuple[int, list[int], SamplingParams]], *, tokenizer: Tokenizer | None, context: int
) -> list[Running]:
    """Requests ready to run; a request ends at its max_tokens or where the context is full."""
    return [
        Running(
            index=index, prompt=ids, params=params, limit=min(params.max_tokens, context - len(ids)),
            stream=TextStream(tokenizer, params.stop),
        )
        for index, ids, params in prompts
    ]  # fmt: skip


def pad_prompts(prompts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [rows, bucket] right-padded with 0, lengths [rows]."""
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(ids) for ids in prompts]
    tokens = np.zeros((rows, bucket(max(len(ids) for ids in prompts))), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


def run_batch(runner: Runner, sequences: list[Running], *, eos: frozenset[int]) -> Iterator[Chunk]:
    """Every token of every sequence as it comes. The device runs step t + 1 while the host looks at step t."""
    rows = runner.padded_rows(len(sequences))
    tokens, lengths = pad_prompts([seq.prompt for seq in sequences], rows)
    capacity = bucket(max(tokens.shape[1], max(len(seq.prompt) + seq.limit for seq in sequences)))
    sampling = runner.rows_of(
        [(p.temperature, p.top_k, p.top_p, p.min_p, p.seed) for p in (seq.params for seq in sequences)], rows
    )
    drawn = any(seq.params.temperature > 0 for seq in sequences)
    state, tokens_now, logprobs_now = runner.prefill(
        runner.empty_cache(rows, capacity), tokens, lengths, sampling, drawn
    )
    alive = np.arange(rows) < len(sequences)
    active = runner.put(alive, "batch")
    for steps_left in range(max(seq.limit for seq in sequences) - 1, -1, -1):
        held = tokens_now, logprobs_now
        if steps_left > 0:
            state, tokens_now, logprobs_now = runner.decode(state, active, sampling, drawn)
        token_row, logprob_row = np.asarray(held[0]), np.asarray(held[1])
        still = alive.copy()
        for row, seq in enumerate(sequences):
            if alive[row]:
                yield seq.push(int(token_row[row]), float(logprob_row[row]), eos)
                still[row] = seq.finish_reason is None
        if not still.any():
            return
        if (still != alive).any():
            alive = still
            active = runner.put(alive, "batch")

"""Step times, separately for steps with prompt tokens and for decode steps; compile time is not included."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class StepClock:
    """Accumulate the times of an engine's steps in seconds, and the tokens they computed.

    The time of a step runs from its dispatch, or from the end of the previous step if that is later, until its tokens
    arrive. Programs are compiled before the dispatch. prompt_s: time of steps with prompt tokens. num_prompt_tokens:
    prompt tokens computed in them, without tokens reused from the prefix cache. Tokens that other requests decode in
    these steps are not counted. decode_s and num_decoded_tokens: time and tokens of all other steps.
    """

    compile_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    num_prompt_tokens: int = 0
    num_decoded_tokens: int = 0
    last_done: float = 0.0

    def done(self, *, sent: float, at: float, num_prompt: int, num_new: int) -> None:
        """Record a step dispatched at `sent` and done at `at`, with num_prompt prompt tokens and num_new new tokens."""
        seconds, self.last_done = at - max(sent, self.last_done), at
        if num_prompt:
            self.prompt_s += seconds
            self.num_prompt_tokens += num_prompt
        else:
            self.decode_s += seconds
            self.num_decoded_tokens += num_new

    @property
    def prompt_tok_s(self) -> float | None:
        """Return the prompt tokens per second; None if no prompt token was computed."""
        return self.num_prompt_tokens / self.prompt_s if self.prompt_s > 0 else None

    @property
    def decode_tok_s(self) -> float | None:
        """Return the decoded tokens per second; None if no token was decoded."""
        return self.num_decoded_tokens / self.decode_s if self.decode_s > 0 and self.num_decoded_tokens else None

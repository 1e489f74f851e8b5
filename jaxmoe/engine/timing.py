"""How long steps took: those with prompt tokens and those of decoding apart, compiling in neither."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class StepClock:
    """Seconds that steps of an engine took, and the tokens they computed.

    A step counts from when it was sent, or the one before it was done, to when its tokens were there; programs are
    compiled before that. prompt_s: of steps with prompt tokens, of which num_prompt_tokens were computed (not those
    found in shared pages); tokens that other requests decode in these steps count nowhere. decode_s: of the others,
    which gave num_decoded_tokens.
    """

    compile_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    num_prompt_tokens: int = 0
    num_decoded_tokens: int = 0
    last_done: float = 0.0

    def done(self, *, sent: float, at: float, num_prompt: int, num_new: int) -> None:
        """Count a step that was sent and done at these times, computed num_prompt prompt tokens and gave num_new."""
        seconds, self.last_done = at - max(sent, self.last_done), at
        if num_prompt:
            self.prompt_s += seconds
            self.num_prompt_tokens += num_prompt
        else:
            self.decode_s += seconds
            self.num_decoded_tokens += num_new

    @property
    def prompt_tok_s(self) -> float | None:
        """Prompt tokens a second; None where none were computed."""
        return self.num_prompt_tokens / self.prompt_s if self.prompt_s > 0 else None

    @property
    def decode_tok_s(self) -> float | None:
        """Decoded tokens a second; None where none were."""
        return self.num_decoded_tokens / self.decode_s if self.decode_s > 0 and self.num_decoded_tokens else None

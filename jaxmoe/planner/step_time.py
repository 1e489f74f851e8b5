"""The work of a step on one rank, and its seconds by bottleneck."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepBatch:
    """Describe the work of one data parallel rank in a step.

    decode: decoding requests. prefill: prompt tokens. context: cached tokens of each decoding request. prompt: mean
    number of tokens that a prompt token attends to.
    """

    decode: float
    prefill: float
    context: float
    prompt: float = 0.0

    @property
    def tokens(self) -> float:
        """Return the number of tokens, decoding and prompt."""
        return self.decode + self.prefill


@dataclass(frozen=True)
class StepTime:
    """Hold the seconds of one step by bottleneck.

    compute: matmuls. memory: memory traffic. link: collectives inside a scale-up domain. scale_out: collectives between
    scale-up domains. launch: kernel launches. bubble: idle pipeline stages.
    """

    compute: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    scale_out: float = 0.0
    launch: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return self.compute + self.memory + self.link + self.scale_out + self.launch + self.bubble

    def mixed(self, share: float, other: StepTime, rest: float) -> StepTime:
        """Return share * self + rest * other."""
        return StepTime(
            share * self.compute + rest * other.compute, share * self.memory + rest * other.memory,
            share * self.link + rest * other.link, share * self.scale_out + rest * other.scale_out,
            share * self.launch + rest * other.launch, share * self.bubble + rest * other.bubble,
        )  # fmt: skip

    def parts(self) -> dict[str, float]:
        """Return the seconds by bottleneck."""
        return {
            "compute": self.compute, "memory": self.memory, "link": self.link, "scale_out": self.scale_out,
            "launch": self.launch, "bubble": self.bubble,
        }  # fmt: skip

"""Throughput benchmark on complete requests: random token ids, end tokens ignored, median of several runs."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxmoe.api.llm import LLM
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """Describe one workload: num_requests prompts of prompt_tokens tokens, each generating new_tokens tokens."""

    num_requests: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.prompt_tokens}x{self.new_tokens}"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Report one measured case.

    seconds: the median run time over the repeats. new_tok_s, total_tok_s: generated tokens, and prompt plus generated
    tokens, per second. compile_s: by how much the first run exceeded the median.
    """

    engine: str
    case: str
    seconds: float
    new_tok_s: float
    total_tok_s: float
    startup_s: float
    compile_s: float
    repeats: int
    mesh: dict[str, int]
    dtype: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON; floats are rounded to three digits."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def parse_cases(text: str) -> list[BenchCase]:
    """Parse cases like "1x128x64,8x128x64". Raises: RequestError naming an invalid part."""
    cases = []
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,6}x[1-9]\d{0,6}", part.strip()):
            raise RequestError(f"case {part!r} must read REQUESTSxPROMPTxNEW with whole numbers from 1, as in 8x128x64")
        requests, prompt, new = map(int, part.strip().split("x"))
        cases.append(BenchCase(num_requests=requests, prompt_tokens=prompt, new_tokens=new))
    return cases


def run_case(llm: LLM, case: BenchCase, *, repeats: int, startup_s: float) -> CaseResult:
    """Measure one case: a first run that compiles, then `repeats` timed runs, each on new random ids.

    Raises: RequestError if a request does not fit the model's context.
    """
    context = llm.config.max_position_embeddings
    if case.prompt_tokens + case.new_tokens > context:
        raise RequestError(
            f"case {case} needs {case.prompt_tokens + case.new_tokens} tokens of context, the model has {context}"
        )
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=case.new_tokens, ignore_eos=True)
    shape = (case.num_requests, case.prompt_tokens)

    def once() -> float:
        low = min(10, llm.config.vocab_size - 1)
        prompts: Sequence[list[int]] = rng.integers(low, min(1000, llm.config.vocab_size), shape).tolist()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        assert all(len(out.token_ids) == case.new_tokens for out in outputs)
        return seconds

    first = once()
    seconds = statistics.median(once() for _ in range(repeats))
    new = case.num_requests * case.new_tokens
    total = case.num_requests * (case.prompt_tokens + case.new_tokens)
    return CaseResult(
        engine="jaxmoe", case=str(case), seconds=seconds, new_tok_s=new / seconds, total_tok_s=total / seconds,
        startup_s=startup_s, compile_s=max(0.0, first - seconds), repeats=repeats, mesh=dict(llm.mesh.shape),
        dtype=llm._runner.dtype,
    )  # fmt: skip

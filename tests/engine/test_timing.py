"""Steps with prompts and steps that decode are timed apart, and compiling is in neither."""

from __future__ import annotations

import time

import pytest

from jaxmoe import SamplingParams
from jaxmoe.engine.timing import StepClock

from ..conftest import ONE_DEVICE


def test_steps_count_from_the_one_before():
    clock = StepClock()
    assert (clock.prompt_tok_s, clock.decode_tok_s) == (None, None)
    clock.done(sent=10.0, at=12.0, num_prompt=100, num_new=1)
    clock.done(sent=11.0, at=12.5, num_prompt=0, num_new=4)  # waited a second for the first
    clock.done(sent=20.0, at=21.5, num_prompt=0, num_new=8)  # was sent after the second
    assert (clock.prompt_tok_s, clock.decode_tok_s) == (pytest.approx(50.0), pytest.approx(6.0))


def test_compiling_counts_by_itself(tiny_llm):
    llm = tiny_llm("qwen3_moe_norm", ONE_DEVICE)
    llm._core = None
    start = time.monotonic()
    (out,) = llm.generate([[3, 1, 4, 1, 5, 9, 2]], SamplingParams(max_tokens=9, ignore_eos=True))
    seconds, timing = time.monotonic() - start, llm.timing
    assert len(out.token_ids) == 9
    assert (timing.num_prompt_tokens, timing.num_decoded_tokens) == (7, 8)
    assert min(timing.compile_s, timing.prompt_s, timing.decode_s) > 0
    assert timing.compile_s + timing.prompt_s + timing.decode_s <= seconds
    before = timing.compile_s
    llm.generate([[3, 1, 4, 1, 5, 9, 2]], SamplingParams(max_tokens=9, ignore_eos=True))
    assert llm.timing.compile_s == before
    assert (timing.num_prompt_tokens, timing.num_decoded_tokens) == (14, 16)

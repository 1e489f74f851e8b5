"""The one comparison of a loaded model with reference results: scores, logits, greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jaxmoe import LLM, SamplingParams

from .tiny.cases import NUM_GREEDY_TOKENS, Case
from .tiny.golden import Reference

LOGIT_TOLERANCE = 2e-4


Answers = tuple[list[list[int]], list[list[float]]]


def answers(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams | list[SamplingParams]) -> Answers:
    """Return the tokens of each prompt's answer, and their log-probabilities."""
    outputs = llm.generate(prompts, params)
    return [out.token_ids for out in outputs], [out.logprobs for out in outputs]


def assert_same_answers(found: Answers, wanted: Answers, *, atol: float = 1e-4) -> None:
    """Equal tokens, and log-probabilities within atol."""
    assert found[0] == wanted[0]
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def assert_agrees(llm: LLM, case: Case, reference: Reference, *, scored: bool = True) -> None:
    """Greedy tokens equal; logits within LOGIT_TOLERANCE, or where not scored the first token's log-probability."""
    prompts = [list(prompt) for prompt in case.prompts]
    if scored:
        _assert_scores_agree(llm, prompts, reference)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_GREEDY_TOKENS, ignore_eos=True))
    assert [out.token_ids for out in outputs] == reference.greedy.tolist()
    if not scored:
        normalized = np.asarray(jax.nn.log_softmax(reference.last_logits))
        firsts = np.take_along_axis(normalized, reference.greedy[:, :1], axis=1)[:, 0]
        np.testing.assert_allclose([out.logprobs[0] for out in outputs], firsts, rtol=0, atol=LOGIT_TOLERANCE)


def _assert_scores_agree(llm: LLM, prompts: list[list[int]], reference: Reference) -> None:
    np.testing.assert_allclose(llm.last_logits(prompts), reference.last_logits, rtol=0, atol=LOGIT_TOLERANCE)
    for scored, expected in zip(llm.score(prompts), reference.prompt_logprobs, strict=True):
        np.testing.assert_allclose(scored, expected, rtol=0, atol=LOGIT_TOLERANCE)

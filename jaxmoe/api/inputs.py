"""Check the prompts and sampling parameters of a call before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.engine.request import SamplingParams, check_prompt
from jaxmoe.errors import RequestError
from jaxmoe.text.eos import special_stop_ids
from jaxmoe.text.tokenizer import CheckpointTokenizer

Prompt = str | Sequence[int]


def check_inputs(
    prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams], *,
    tokenizer: CheckpointTokenizer | None, config: ModelConfig, eos: frozenset[int],
) -> list[tuple[list[int], SamplingParams]]:  # fmt: skip
    """Return the token ids and sampling parameters of each request.

    params: of all prompts, or one for each. Raises: RequestError if the model cannot run one of them.
    """
    prompts = listed(prompts)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if not isinstance(each, Sequence) or not all(isinstance(p, SamplingParams) for p in each):
        raise RequestError(f"params must be SamplingParams, one or a list with one for each prompt, not {params!r:.60}")
    if len(each) != len(prompts):
        raise RequestError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one for each")
    if tokenizer is None and any(p.stop for p in each):
        raise RequestError("stop strings need a tokenizer.json, and this model has none: leave stop empty")
    for p in each:
        special = special_stop_ids(tokenizer, p.stop, vocab_size=config.vocab_size)
        p.check_token_ids(vocab_size=config.vocab_size, num_eos=len(eos.union(special)))
    checked = check_prompts([_token_ids(prompt, tokenizer) for prompt in prompts], config, room=1)
    return list(zip(checked, each, strict=True))


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, *, room: int) -> list[list[int]]:
    """Return the token ids of each prompt, which leave room for this many more tokens. Raises: RequestError."""
    if not prompts:
        raise RequestError("no prompts were given: give at least one")
    context = config.max_position_embeddings - room
    return [
        check_prompt(ids, index=index, vocab_size=config.vocab_size, context=context)
        for index, ids in enumerate(prompts)
    ]


def _token_ids(prompt: Prompt, tokenizer: CheckpointTokenizer | None) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise RequestError("this model has no tokenizer.json: give token ids")
    return tokenizer.encode(prompt)


def listed(prompts: Iterable[Any]) -> list[Any]:
    """Return the prompts as a list. Raises: RequestError for a single text or an object that is not iterable."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be a list of texts or of lists of token ids, not {prompts!r:.60}")
    return list(prompts)

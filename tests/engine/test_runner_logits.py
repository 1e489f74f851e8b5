"""Several tokens of a row sampled in one step: as each gives by itself, after the tokens before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.engine.batch import RequestMetadata, bucket_of, pack, pack_bitmasks
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.scheduler import ScheduledSequence, StepScheduler
from jaxmoe.errors import StepError

from ..conftest import ONE_DEVICE, mesh_of

CASES = [
    ("qwen3_moe_norm", ONE_DEVICE),
    ("qwen3_moe_norm", "data=2,tensor=2,expert=2"),
    ("llama_llama3", "data=2,tensor=2"),
    pytest.param("qwen3_moe_norm", "pipeline=2,data=2", marks=pytest.mark.sweep),
]
SPLIT_TOKENS = "batch=,context=data+expert,split=tensor,experts=expert,expert_width=tensor,sequence=tensor"
PROMPTS = [[1, 5, 9, 2, 6, 5, 3, 9, 7, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5], [5, 8], [2, 7, 1, 8, 2, 8, 1]]
NUM_SAMPLED = [3, 3, 2, 1]


def sampled_at_once(llm, params: list[SamplingParams], token_bitmask=None):
    """The last tokens of every prompt, NUM_SAMPLED of them, sampled in one step: (tokens, logprobs) of each prompt."""
    runner = llm._runner
    stages, shares, whole = runner.placement.num_stages, runner.context_ranks, runner.placement.strip_tokens
    page_size, pages = 4 * shares, 4
    config = SchedulerConfig(
        num_ranks=runner.num_ranks, max_num_seqs=4 * stages * shares, chunk_tokens=64, block_tokens=4 * shares,
        num_pages=32, page_size=page_size, context=page_size * pages,
    )  # fmt: skip
    scheduler = StepScheduler(config)
    for index, prompt in enumerate(PROMPTS):
        scheduler.add(ScheduledSequence(request_id=index, tokens=list(prompt), max_total=len(prompt) + 1))
    plan = scheduler.plan()
    counts = dict(enumerate(NUM_SAMPLED))
    chunks = [replace(chunk, num_sampled=counts[chunk.sequence.request_id]) for chunk in plan.chunks]
    plan = replace(plan, chunks=chunks)
    assert [count for _, count in plan.sampled()] == NUM_SAMPLED
    bucket = bucket_of(plan, config, min_seq_slots=1, pages=pages, stages=stages, shares=shares, whole=whole)
    assert bucket.logits_per_slot == 3

    def metadata_of(index: int) -> RequestMetadata:
        own = params[index]
        return RequestMetadata(
            params=own, num_prompt=len(PROMPTS[index]), ends=(), seed=own.seed or 0, token_bitmask=token_bitmask
        )

    packed = pack(plan, bucket, config, metadata_of)
    bitmask = pack_bitmasks(plan, bucket, config, metadata_of, vocab_size=llm.config.vocab_size)
    state = runner.empty_state(config.max_num_seqs, config.num_pages, config.page_size)
    features = any(p.temperature > 0 for p in params), any(p.adjusts_logits for p in params), False
    state, output = runner.step(
        state, packed, features, bucket, decode_steps=1, max_decode_steps=1, token_bitmask=bitmask
    )
    tokens, logprobs, last = (np.asarray(a) for a in (output.sampled.tokens, output.sampled.logprobs, state.tokens))
    assert tokens.shape == (3, config.num_ranks, config.max_num_seqs)
    found = []
    for sequence, count in plan.sampled():
        at = sequence.rank, sequence.slot
        found.append((tokens[:count, *at].tolist(), logprobs[:count, *at].tolist()))
        assert last[at] == tokens[count - 1, *at]
    others = np.ones(last.shape, bool)
    others[tuple(zip(*((s.rank, s.slot) for s, _ in plan.sampled()), strict=True))] = False
    assert not last[others].any()
    return found


def prefixes(index: int) -> list[list[int]]:
    prompt, count = PROMPTS[index], NUM_SAMPLED[index]
    return [prompt[: len(prompt) - count + 1 + number] for number in range(count)]


@pytest.mark.parametrize(("name", "mesh"), CASES)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.2, "repetition_penalty": 1.8, "logit_bias": {7: 2.0}}],
    ids=["greedy", "random", "penalties"],
)
def test_the_last_tokens_of_a_prompt_sample_what_its_prefixes_sample(name, mesh, options, tiny_llm):
    llm = tiny_llm(name, mesh)
    params = [SamplingParams(max_tokens=1, ignore_eos=True, seed=40 + index, **options) for index in range(4)]
    for index, (tokens, logprobs) in enumerate(sampled_at_once(llm, params)):
        alone = [llm.generate([prefix], params[index])[0] for prefix in prefixes(index)]
        assert tokens == [out.token_ids[0] for out in alone]
        np.testing.assert_allclose(logprobs, [out.logprobs[0] for out in alone], atol=1e-5)


@pytest.mark.sweep
def test_the_same_where_ranks_share_the_tokens_of_a_prompt(tiny_dir):
    mesh = mesh_of("data=2,tensor=2,expert=2")
    llm = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh, layout=SPLIT_TOKENS, dtype="float32")
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    for index, (tokens, logprobs) in enumerate(sampled_at_once(llm, [params] * 4)):
        alone = [llm.generate([prefix], params)[0] for prefix in prefixes(index)]
        assert tokens == [out.token_ids[0] for out in alone]
        np.testing.assert_allclose(logprobs, [out.logprobs[0] for out in alone], atol=1e-5)


def test_every_token_has_the_bitmask_of_the_tokens_before_it(tiny_llm):
    llm = tiny_llm("qwen3_moe_norm", ONE_DEVICE)
    vocab = llm.config.vocab_size

    def allowed(tokens) -> np.ndarray:
        return np.random.default_rng([len(tokens), *tokens]).random(vocab) < 0.2

    def token_bitmask(tokens) -> np.ndarray:
        bits = np.zeros(-(-vocab // 32) * 32, bool)
        bits[:vocab] = allowed(tokens)
        return np.packbits(bits, bitorder="little").view(np.int32)

    greedy = SamplingParams(max_tokens=1, ignore_eos=True)
    for index, (tokens, _) in enumerate(sampled_at_once(llm, [greedy] * 4, token_bitmask)):
        wanted = [
            int(np.where(allowed(prefix), llm.last_logits([prefix])[0], -np.inf).argmax()) for prefix in prefixes(index)
        ]
        assert tokens == wanted
    with pytest.raises(StepError, match="int64"):
        sampled_at_once(llm, [greedy] * 4, lambda tokens: token_bitmask(tokens).astype(np.int64))

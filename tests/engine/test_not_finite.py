"""Logits that are not finite fail the request they belong to, with an error that says what to try, and no other."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe import AsyncEngine, SamplingParams, StepError
from jaxmoe.engine.core import not_finite

from ..cli.commands import jaxmoe
from ..conftest import ONE_DEVICE

CASE, BAD = "qwen3_moe_norm", 100
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = [[1, 5, 9, 2, 6, 5, 3], [3, 1, 4], [5, 8]]
SAID = "are not finite: qwen3_moe in float32 overflowed, or its weights hold NaN; check"


@pytest.fixture
def llm(tiny_llm):
    """A model whose embedding of one token is NaN; the others are as they were."""
    llm = tiny_llm(CASE, ONE_DEVICE)
    at = next(i for i, leaf in enumerate(llm._runner.leaves) if leaf.shape[0] == llm.config.vocab_size)
    whole = llm._runner.leaves[at]
    llm._runner.leaves[at], llm._core = whole.at[BAD].set(jnp.nan), None
    yield llm
    llm._runner.leaves[at], llm._core = whole, None


def test_a_request_fails_by_itself_and_leaves_nothing_behind(llm):
    """The prompts begin with the same page, which was computed beside the token that has no number."""
    expected = [out.token_ids for out in llm.generate(PROMPTS, GREEDY)]

    async def heard(engine, prompt, **options):
        return [chunk.token_id async for chunk in engine.stream(prompt, SamplingParams(max_tokens=6, **options))]

    async def scene(engine):
        bad = [[*PROMPTS[0][:5], BAD], [BAD]]
        found = await asyncio.gather(*(heard(engine, p, ignore_eos=True) for p in bad), *(
            heard(engine, p, ignore_eos=True) for p in PROMPTS[1:]), return_exceptions=True,
        )  # fmt: skip
        for error in found[:2]:
            assert isinstance(error, StepError)
            assert "not finite" in str(error)
        assert found[2:] == expected[1:]
        assert await heard(engine, PROMPTS[0], ignore_eos=True) == expected[0]
        with pytest.raises(StepError, match="not finite"):  # whatever bans and draws do to the logits
            await heard(engine, bad[0], temperature=1.0, logit_bias={3: 9.0}, min_tokens=3, n=2)

    with AsyncEngine(llm, max_num_seqs=4, context=32, page_size=4, chunk_tokens=16, decode_steps=3) as engine:
        asyncio.run(scene(engine))
    assert engine.stats()["pages_in_use"] == 0


def test_generate_score_and_last_logits_say_so(llm):
    bad = [*PROMPTS[0][:5], BAD]
    with pytest.raises(StepError, match=f"prompt 0 after 6 tokens {SAID}"):
        llm.generate([bad, *PROMPTS[1:]], GREEDY)
    assert len(llm.generate(PROMPTS, GREEDY)) == 3
    with pytest.raises(StepError, match=f"prompt 1 {SAID}"):
        llm.score([PROMPTS[0], [*bad, 7]])
    assert len(llm.score(PROMPTS)) == 3
    with pytest.raises(StepError, match="the last token of prompt 1 are not finite"):
        llm.last_logits([PROMPTS[0], bad])
    assert np.isfinite(llm.last_logits(PROMPTS)).all()


def test_no_request_of_another_rank_fails_on_a_mesh(tiny_llm):
    """Tokens travel to the experts of other ranks beside the one that has no number."""
    llm = tiny_llm(CASE, "data=2,tensor=2,expert=2")
    expected = [out.token_ids for out in llm.generate(PROMPTS, GREEDY)]
    at = next(i for i, leaf in enumerate(llm._runner.leaves) if leaf.shape[0] == llm._runner.sizes[0].vocab)
    whole, llm._core = llm._runner.leaves[at], None
    llm._runner.leaves[at] = jax.device_put(whole.at[BAD].set(jnp.nan), whole.sharding)
    try:
        chunks = {}
        with AsyncEngine(llm, max_num_seqs=8, context=32, page_size=4, chunk_tokens=16) as engine:

            async def heard(index, prompt):
                chunks[index] = [chunk.token_id async for chunk in engine.stream(prompt, GREEDY)]

            async def scene():
                bad = [heard("bad", [*PROMPTS[0][:5], BAD]), heard("worse", [BAD])]
                good = [heard(index, prompt) for index, prompt in enumerate(PROMPTS)]
                return await asyncio.gather(*bad, *good, return_exceptions=True)

            failed = asyncio.run(scene())
        assert [isinstance(one, StepError) for one in failed] == [True, True, False, False, False]
        assert [chunks[index] for index in range(len(PROMPTS))] == expected
    finally:
        llm._runner.leaves[at], llm._core = whole, None


def test_the_remedy_is_a_wider_dtype_where_there_is_one(llm, monkeypatch):
    for dtype, remedy in (("float16", "dtype bfloat16 or float32"), ("bfloat16", "dtype float32")):
        monkeypatch.setattr(llm._runner, "dtype", dtype)
        assert f"in {dtype} overflowed" in str(not_finite(llm._runner, "prompt 0"))
        assert f"load it with {remedy}, or check" in str(not_finite(llm._runner, "prompt 0"))


@pytest.mark.parametrize("command", ["generate", "score"])
def test_commands_exit_with_one_line(command, capsys, tiny_dir, tmp_path):
    """The weights are finite, the logits are not."""
    source = tiny_dir("mixtral_window")
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2e38}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "ids").write_text("[1, 2, 3, 4]\n[5, 6]\n")
    options = {"generate": ["--prompt-ids", tmp_path / "ids", "--max-tokens", 3], "score": ["--ids", tmp_path / "ids"]}
    mesh = ["--mesh", "data=2,tensor=2,expert=2", "--dtype", "float32", "--json"]
    outcome = jaxmoe(capsys, command, tmp_path, *options[command], *mesh)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert "not finite: mixtral in float32 overflowed" in outcome.err

"""Pages in host memory: what comes back is what went, on one device and on a mesh, in every kind of number."""

from __future__ import annotations

import asyncio

import jax
import numpy as np
import pytest

from jaxmoe import LLM, AsyncEngine, SamplingParams
from jaxmoe.cache.pages import PageCopy
from jaxmoe.engine.transfer import HostOffload

from ..conftest import ONE_DEVICE, mesh_of

CASE = "mixtral_window"
MESH = "data=2,tensor=2,expert=2"


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH])
def test_a_page_comes_back_as_it_went(mesh, kv_dtype, tiny_dir):
    runner = LLM.load(tiny_dir(CASE), mesh=mesh_of(mesh), dtype="float32", kv_dtype=kv_dtype)._runner
    empty = runner.empty_state(2, 5, 4)
    rng = np.random.default_rng(0)
    fill = lambda array: jax.device_put(rng.integers(1, 99, array.shape).astype(array.dtype), array.sharding)  # noqa: E731
    state = empty._replace(pages=jax.tree.map(fill, empty.pages), token_pages=fill(empty.token_pages))
    before = [np.array(array) for array in jax.tree.leaves(state)]
    host_offload, last = HostOffload(runner), runner.num_ranks - 1
    state = host_offload.run(state, last, PageCopy("out", 3, 7))
    state = host_offload.run(state, 0, PageCopy("out", 0, 1))
    assert len(host_offload) == 2
    state = host_offload.run(state, last, PageCopy("in", 2, 7))
    state = host_offload.run(state, 0, PageCopy("in", 4, 1))
    assert len(host_offload) == 0
    for array, old in zip(jax.tree.leaves(state), before, strict=True):
        pages = old.swapaxes(0, 1) if array.ndim >= 4 else old  # [layers, pages, ...], and [pages, tokens]
        if len(pages) == 5 * runner.num_ranks:
            pages[last * 5 + 2], pages[4] = pages[last * 5 + 3], pages[0]
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH])
def test_prompts_that_come_again_are_brought_back(mesh, tiny_llm):
    """More prompts than the pool holds, twice: the second time their beginnings come from host memory."""
    llm = tiny_llm(CASE, mesh)
    prompts = [[(i * step + step) % 40 for i in range(33)] for step in range(1, 13)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    alone = [out.token_ids for out in llm.generate(prompts, params)]

    async def one_by_one(engine):
        return [[chunk.token_id async for chunk in engine.stream(prompt, params)] for prompt in prompts]

    page_gib = llm._runner.bytes_per_token / llm._runner.placement.num_shards("kv_head") * 4 / 2**30
    with AsyncEngine(
        llm, max_num_seqs=2, context=40, page_size=4, chunk_tokens=16, kv_cache_gib=10.5 * page_gib, host_cache_gib=1e-3
    ) as engine:
        engine._core.scheduler.enable_offload(True)  # whatever these tiny pages measure
        for _ in range(2):
            assert asyncio.run(one_by_one(engine)) == alone
        stats = engine.stats()
        assert engine._core.copy_s > 0
        assert engine._core.compute_s > 0
    window = llm.config.sliding_windows[0]
    assert stats["pages_swapped_in"] >= 12 * (window // 4)  # of each beginning what its next token sees
    assert stats["cached_prompt_tokens"] >= 12 * 28
    assert stats["pages_on_host"] > 0
    assert stats["pages_in_use"] == 0


def test_what_is_cheaper_to_compute_again_is(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    with AsyncEngine(llm, max_num_seqs=2, context=40, page_size=4, chunk_tokens=16, host_cache_gib=1e-4) as engine:
        core = engine._core
        assert core.scheduler.offloads_pages == (core.copy_s < core.compute_s)
        core.scheduler.enable_offload(False)
        params = SamplingParams(max_tokens=1, ignore_eos=True)

        async def ask():
            return [chunk async for chunk in engine.stream([1] * 30, params)]

        asyncio.run(ask())
        assert engine.stats()["pages_swapped_in"] == 0
        assert core.scheduler.pools[0].num_on_host == 0

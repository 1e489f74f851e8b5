"""Attention over pages is attention over the tokens in them, whatever lies in the rest of the pool."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import MaskSpec, causal_attention
from jaxmoe.ops.paged_attention import (
    BACKENDS,
    ContextShard,
    merge_attention,
    paged_attention,
    partial_attention,
    write_pages,
)

from .stacks import LAYER, stacked
from .test_linear import compiler_found

SLOTS, GROUP, HEAD_DIM, NUM_PAGES = 2, 3, 8, 80


def backend_runs(backend: str, dtype: str) -> bool:
    """Whether an implementation can run here; without a C++ compiler, checks what a user of `native` is told."""
    return backend != "native" or compiler_found(dtype)


def pool_of(lengths: list[int], page_size: int, dtype: str):
    """Prompts of these lengths, and a pool that holds them on scattered pages; NaN everywhere else."""
    rng = np.random.default_rng(0)
    shuffled = iter(rng.permutation(NUM_PAGES))
    pages = np.full((2, NUM_PAGES, SLOTS, page_size, HEAD_DIM), np.nan, np.float32)
    block_table = np.zeros((len(lengths), -(-max(lengths) // page_size) + 2), np.int32)
    prompts = []
    for row, length in enumerate(lengths):
        q = rng.normal(0, 1, (length, SLOTS, GROUP, HEAD_DIM)).astype(np.float32)
        kv = rng.normal(0, 1, (2, length, SLOTS, HEAD_DIM)).astype(np.float32)
        for page in range(-(-length // page_size)):
            block_table[row, page] = next(shuffled)
            part = kv[:, page * page_size : (page + 1) * page_size].swapaxes(1, 2)
            pages[:, block_table[row, page], :, : part.shape[2]] = part
        prompts.append(tuple(jnp.asarray(a, dtype) for a in (q, *kv)))
    return prompts, jnp.asarray(pages, dtype), jnp.asarray(block_table)


SCALE = HEAD_DIM**-0.5
MASK_SPECS = [MaskSpec(scale=SCALE, window=window) for window in (None, 1, 6)]
MASK_SPECS += [MaskSpec(scale=0.5, chunk=7), MaskSpec(scale=SCALE, window=4, chunk=16)]
SINKS = np.random.default_rng(2).normal(0, 2, (SLOTS, GROUP)).astype(np.float32)


PAGES = [(4, 1), (4, 5), (16, 40), (3, 17)]
# Every mask with one size of pages and prompts in turn, in each dtype; all with all in the sweep.
LAST_TOKENS = [
    pytest.param(
        backend, *pages, mask_spec, dtype, marks=() if (at + number + wide) % len(PAGES) == 0 else pytest.mark.sweep
    )
    for backend in BACKENDS
    for at, pages in enumerate(PAGES)
    for number, mask_spec in enumerate(MASK_SPECS)
    for wide, dtype in enumerate(("float32", "bfloat16"))
]


@pytest.mark.parametrize(("backend", "page_size", "tokens", "mask_spec", "dtype"), LAST_TOKENS)
def test_the_last_tokens_of_prompts(backend, page_size, tokens, mask_spec, dtype):
    if not backend_runs(backend, dtype):
        return
    lengths = [tokens + 9, tokens, tokens + 110, tokens + 2]
    query_lens = [tokens, max(1, tokens - 3), tokens, 0]
    prompts, (k_pages, v_pages), block_table = pool_of(lengths, page_size, dtype)
    positions = jnp.array([length - tokens for length in lengths])
    lengths = [int(at) + count for at, count in zip(positions, query_lens, strict=True)]
    q = jnp.stack([prompt[0][int(at) : int(at) + tokens] for prompt, at in zip(prompts, positions, strict=True)])
    sinks = jnp.asarray(SINKS) if mask_spec.chunk else None
    found = jax.jit(paged_attention, static_argnames=("mask_spec", "backend"))(
        q,
        (stacked(k_pages), stacked(v_pages)),
        block_table,
        positions,
        jnp.array(query_lens),
        LAYER,
        sinks,
        mask_spec=mask_spec,
        backend=backend,
    )
    for row, ((q_row, k, v), length, count) in enumerate(zip(prompts, lengths, query_lens, strict=True)):
        if count:
            whole = causal_attention(*(part[None, :length] for part in (q_row, k, v)), sinks, mask_spec=mask_spec)[
                0, -count:
            ]
            tolerance = 1e-5 if dtype == "float32" else 0.03
            np.testing.assert_allclose(
                np.asarray(found[row, :count], np.float32), np.asarray(whole, np.float32), atol=tolerance
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_spec", MASK_SPECS[2:4])
def test_what_lies_behind_all_that_is_seen_may_be_anything(mask_spec, backend):
    """The table names a page full of NaN in place of those given back."""
    if not backend_runs(backend, "float32"):
        return
    (prompt, other), (k_pages, v_pages), block_table = pool_of([70, 33], 4, "float32")
    k_pages, v_pages = (jnp.concatenate([part, jnp.full_like(part[:1], jnp.nan)]) for part in (k_pages, v_pages))
    behind = jnp.array([mask_spec.first_visible(64), mask_spec.first_visible(30)])[:, None] // 4
    block_table = jnp.where(jnp.arange(block_table.shape[1]) < behind, len(k_pages) - 1, block_table)
    q = jnp.stack([prompt[0][64:70], jnp.pad(other[0][30:33], ((0, 3), (0, 0), (0, 0), (0, 0)))])
    found = jax.jit(paged_attention, static_argnames=("mask_spec", "backend"))(
        q,
        (stacked(k_pages), stacked(v_pages)),
        block_table,
        jnp.array([64, 30]),
        jnp.array([6, 3]),
        LAYER,
        mask_spec=mask_spec,
        backend=backend,
    )
    for row, (parts, count) in enumerate(((prompt, 6), (other, 3))):
        whole = causal_attention(*(part[None] for part in parts), mask_spec=mask_spec)[0, -count:]
        np.testing.assert_allclose(found[row, :count], whole, atol=1e-5)


def test_writing_changes_the_named_places_alone():
    rng = np.random.default_rng(0)
    pages = rng.normal(0, 1, (5, SLOTS, 4, HEAD_DIM)).astype(np.float32)
    new = rng.normal(0, 1, (3, SLOTS, HEAD_DIM)).astype(np.float32)
    expected = pages.copy()
    expected[2, :, 3], expected[0, :, 1] = new[0], new[2]
    places = jnp.array([2, 5, 0]), jnp.array([3, 0, 1])  # page 5 is past the last
    found = jax.jit(write_pages)((stacked(pages), stacked(-pages)), (new, -new), *places, LAYER)
    np.testing.assert_array_equal(found[0], stacked(expected))
    np.testing.assert_array_equal(found[1], stacked(-expected))


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_of_eight_bits_mean_their_numbers_times_their_scales(backend, dtype, cache_dtype):
    """Attention over them is attention over what they stand for, and that is near what was written."""
    if not backend_runs(backend, dtype):
        return
    rng = np.random.default_rng(0)
    lengths, page_size = [21, 3, 34], 8
    pages = [jnp.full((NUM_PAGES, SLOTS, page_size, HEAD_DIM), 1, cache_dtype) for _ in range(2)]
    pages += [jnp.full((NUM_PAGES, SLOTS, page_size), jnp.nan) for _ in range(2)]
    pages = [stacked(part) for part in pages]
    block_table = jnp.asarray(rng.permutation(NUM_PAGES)[:15].reshape(3, 5), jnp.int32)
    wide = [jnp.full((NUM_PAGES, SLOTS, page_size, HEAD_DIM), jnp.nan, "float32") for _ in range(2)]
    for row, length in enumerate(lengths):
        k, v = (jnp.asarray(rng.normal(0, 10.0**row, (length, SLOTS, HEAD_DIM)), dtype) for _ in range(2))
        places = block_table[row, np.arange(length) // page_size], jnp.arange(length) % page_size
        pages = write_pages(tuple(pages), (k, v), *places, LAYER)
        for index, new in enumerate((k, v)):
            kept = pages[index][LAYER, places[0], :, places[1]].astype("float32")
            kept = kept * pages[index + 2][LAYER, places[0], :, places[1]][..., None]
            largest = np.abs(np.asarray(new, np.float32)).max(-1, keepdims=True)
            assert (
                np.abs(kept - np.asarray(new, np.float32))
                <= largest * (1 / 254 + 1e-6 if cache_dtype == "int8" else 1 / 16)
            ).all()
            wide[index] = wide[index].at[places[0], :, places[1]].set(kept)
    q = jnp.asarray(rng.normal(0, 1, (3, 1, SLOTS, GROUP, HEAD_DIM)), dtype)
    query_lens = jnp.ones(3, jnp.int32)
    ask = partial(
        paged_attention,
        block_table=block_table,
        positions=jnp.array(lengths) - 1,
        query_lens=query_lens,
        layer=LAYER,
        mask_spec=MASK_SPECS[0],
    )
    found = ask(q, tuple(pages), backend=backend)
    expected = ask(q.astype("float32"), tuple(stacked(part) for part in wide), backend="loop")
    scale = 10.0 ** np.arange(3).reshape(3, 1, 1, 1, 1)
    tolerance = 2e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(np.asarray(found, np.float32) / scale, np.asarray(expected) / scale, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask_spec", [MASK_SPECS[0], MaskSpec(scale=SCALE, window=7), MaskSpec(scale=SCALE, chunk=20)])
def test_how_a_prompt_is_cut_changes_no_bit_of_the_native_result(mask_spec, dtype):
    if not backend_runs("native", dtype):
        return
    ((q, _, _),), pages, block_table = pool_of([70], 16, dtype)
    ask = partial(paged_attention, pages=(pages[0][None], pages[1][None]), mask_spec=mask_spec, backend="native")
    whole = ask(q[None], block_table=block_table, positions=jnp.array([0]), query_lens=jnp.array([70]))
    for start, count in ((0, 33), (33, 20), (53, 17), (69, 1)):
        part = ask(
            q[None, start : start + count],
            block_table=block_table,
            positions=jnp.array([start]),
            query_lens=jnp.array([count]),
        )
        np.testing.assert_array_equal(
            np.asarray(part[0], np.float32), np.asarray(whole[0, start : start + count], np.float32)
        )


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_the_first_numbers_of_keys(backend, cache_dtype):
    """As latent attention keeps them: one array, and one scale."""
    if not backend_runs(backend, "float32"):
        return
    ((q, k, _),), _, _ = pool_of([37], 8, "float32")
    places = jnp.arange(37) // 8 + 3, jnp.arange(37) % 8
    shape = (NUM_PAGES, SLOTS, 8, HEAD_DIM)
    pages = [jnp.zeros(shape, cache_dtype), *([jnp.zeros(shape[:-1])] if cache_dtype == "int8" else [])]
    pages = write_pages(tuple(stacked(part) for part in pages), (k,), *places, LAYER)
    found = paged_attention(
        q[None],
        pages,
        jnp.arange(3, 8)[None],
        jnp.array([0]),
        jnp.array([37]),
        LAYER,
        mask_spec=MASK_SPECS[0],
        value_dim=5,
        backend=backend,
    )
    expected = causal_attention(q[None], k[None], k[None, ..., :5], mask_spec=MASK_SPECS[0])
    np.testing.assert_allclose(found, expected, atol=1e-5 if cache_dtype == "float32" else 0.03)


def test_sinks_take_part_once_where_ranks_share_pages_out():
    lengths, page_size = [29, 8], 8
    prompts, (k_pages, v_pages), block_table = pool_of(lengths, page_size, "float32")
    positions = jnp.array(lengths) - 1
    q = jnp.stack([prompt[0][length - 1 :] for prompt, length in zip(prompts, lengths, strict=True)])
    metadata = block_table, positions, jnp.ones(2, jnp.int32), LAYER
    pages = stacked(k_pages), stacked(v_pages)
    whole = paged_attention(q, pages, *metadata, SINKS, mask_spec=MASK_SPECS[3])
    parts = [
        partial_attention(q, tuple(part[:, :, :, 4 * rank : 4 * rank + 4] for part in pages), *metadata,
                          shard=ContextShard(rank, 2), mask_spec=MASK_SPECS[3])
        for rank in range(2)
    ]  # fmt: skip
    merged = merge_attention(jnp.stack(parts)[:, :, 0], SINKS)
    np.testing.assert_allclose(merged, whole[:, 0], atol=1e-5)

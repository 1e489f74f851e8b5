"""Attention over pages is attention over the tokens in them, whatever lies in the rest of the pool."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.paged import PAGED_KINDS, paged_attention, write_pages

from .stacks import AT, stacked
from .test_linear import compiler_found

SLOTS, GROUP, HEAD_DIM, NUM_PAGES = 2, 3, 8, 80


def kind_runs(kind: str, dtype: str) -> bool:
    """Whether an implementation can run here; without a C++ compiler, checks what a user of `native` is told."""
    return kind != "native" or compiler_found(dtype)


def pool_of(lengths: list[int], page_size: int, dtype: str):
    """Prompts of these lengths, and a pool that holds them on scattered pages; NaN everywhere else."""
    rng = np.random.default_rng(0)
    shuffled = iter(rng.permutation(NUM_PAGES))
    pages = np.full((2, NUM_PAGES, SLOTS, page_size, HEAD_DIM), np.nan, np.float32)
    table = np.zeros((len(lengths), -(-max(lengths) // page_size) + 2), np.int32)
    prompts = []
    for row, length in enumerate(lengths):
        q = rng.normal(0, 1, (length, SLOTS, GROUP, HEAD_DIM)).astype(np.float32)
        kv = rng.normal(0, 1, (2, length, SLOTS, HEAD_DIM)).astype(np.float32)
        for page in range(-(-length // page_size)):
            table[row, page] = next(shuffled)
            part = kv[:, page * page_size : (page + 1) * page_size].swapaxes(1, 2)
            pages[:, table[row, page], :, : part.shape[2]] = part
        prompts.append(tuple(jnp.asarray(a, dtype) for a in (q, *kv)))
    return prompts, jnp.asarray(pages, dtype), jnp.asarray(table)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("page_size", "tokens"), [(4, 1), (4, 5), (16, 40), (3, 17)])
@pytest.mark.parametrize("kind", PAGED_KINDS)
def test_the_last_tokens_of_prompts(kind, page_size, tokens, window, dtype):
    if not kind_runs(kind, dtype):
        return
    lengths = [tokens + 9, tokens, tokens + 70, tokens + 2]
    counts = [tokens, max(1, tokens - 3), tokens, 0]
    prompts, (k_pages, v_pages), table = pool_of(lengths, page_size, dtype)
    positions = jnp.array([length - tokens for length in lengths])
    lengths = [int(at) + count for at, count in zip(positions, counts, strict=True)]
    q = jnp.stack([prompt[0][int(at) : int(at) + tokens] for prompt, at in zip(prompts, positions, strict=True)])
    found = jax.jit(paged_attention, static_argnames=("window", "kind"))(
        q, (stacked(k_pages), stacked(v_pages)), table, positions, jnp.array(counts), AT, window=window, kind=kind
    )
    for row, ((q_row, k, v), length, count) in enumerate(zip(prompts, lengths, counts, strict=True)):
        if count:
            whole = causal_attention(q_row[None, :length], k[None, :length], v[None, :length], window=window)[
                0, -count:
            ]
            tolerance = 1e-5 if dtype == "float32" else 0.03
            np.testing.assert_allclose(
                np.asarray(found[row, :count], np.float32), np.asarray(whole, np.float32), atol=tolerance
            )


def test_writing_changes_the_named_places_alone():
    rng = np.random.default_rng(0)
    pages = rng.normal(0, 1, (5, SLOTS, 4, HEAD_DIM)).astype(np.float32)
    new = rng.normal(0, 1, (3, SLOTS, HEAD_DIM)).astype(np.float32)
    expected = pages.copy()
    expected[2, :, 3], expected[0, :, 1] = new[0], new[2]
    places = jnp.array([2, 5, 0]), jnp.array([3, 0, 1])  # page 5 is past the last
    found = jax.jit(write_pages)((stacked(pages), stacked(-pages)), new, -new, *places, AT)
    np.testing.assert_array_equal(found[0], stacked(expected))
    np.testing.assert_array_equal(found[1], stacked(-expected))


@pytest.mark.parametrize("kept_in", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", PAGED_KINDS)
def test_pages_of_eight_bits_mean_their_numbers_times_their_scales(kind, dtype, kept_in):
    """Attention over them is attention over what they stand for, and that is near what was written."""
    if not kind_runs(kind, dtype):
        return
    rng = np.random.default_rng(0)
    lengths, page_size = [21, 3, 34], 8
    pages = [jnp.full((NUM_PAGES, SLOTS, page_size, HEAD_DIM), 1, kept_in) for _ in range(2)]
    pages += [jnp.full((NUM_PAGES, SLOTS, page_size), jnp.nan) for _ in range(2)]
    pages = [stacked(part) for part in pages]
    table = jnp.asarray(rng.permutation(NUM_PAGES)[:15].reshape(3, 5), jnp.int32)
    wide = [jnp.full((NUM_PAGES, SLOTS, page_size, HEAD_DIM), jnp.nan, "float32") for _ in range(2)]
    for row, length in enumerate(lengths):
        k, v = (jnp.asarray(rng.normal(0, 10.0**row, (length, SLOTS, HEAD_DIM)), dtype) for _ in range(2))
        places = table[row, np.arange(length) // page_size], jnp.arange(length) % page_size
        pages = write_pages(tuple(pages), k, v, *places, AT)
        for index, new in enumerate((k, v)):
            kept = pages[index][AT, places[0], :, places[1]].astype("float32")
            kept = kept * pages[index + 2][AT, places[0], :, places[1]][..., None]
            largest = np.abs(np.asarray(new, np.float32)).max(-1, keepdims=True)
            assert (
                np.abs(kept - np.asarray(new, np.float32))
                <= largest * (1 / 254 + 1e-6 if kept_in == "int8" else 1 / 16)
            ).all()
            wide[index] = wide[index].at[places[0], :, places[1]].set(kept)
    q = jnp.asarray(rng.normal(0, 1, (3, 1, SLOTS, GROUP, HEAD_DIM)), dtype)
    counts = jnp.ones(3, jnp.int32)
    ask = partial(paged_attention, table=table, positions=jnp.array(lengths) - 1, counts=counts, at=AT)
    found = ask(q, tuple(pages), kind=kind)
    expected = ask(q.astype("float32"), tuple(stacked(part) for part in wide), kind="loop")
    scale = 10.0 ** np.arange(3).reshape(3, 1, 1, 1, 1)
    tolerance = 2e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(np.asarray(found, np.float32) / scale, np.asarray(expected) / scale, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 7])
def test_how_a_prompt_is_cut_changes_no_bit_of_the_native_result(window, dtype):
    if not kind_runs("native", dtype):
        return
    ((q, _, _),), pages, table = pool_of([70], 16, dtype)
    ask = partial(paged_attention, pages=(pages[0][None], pages[1][None]), window=window, kind="native")
    whole = ask(q[None], table=table, positions=jnp.array([0]), counts=jnp.array([70]))
    for start, count in ((0, 33), (33, 20), (53, 17), (69, 1)):
        part = ask(q[None, start : start + count], table=table, positions=jnp.array([start]), counts=jnp.array([count]))
        np.testing.assert_array_equal(
            np.asarray(part[0], np.float32), np.asarray(whole[0, start : start + count], np.float32)
        )

"""Caches of two kinds in one model: layers that see everything, and layers with a window, each with its own pages."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.cache.pages import PagePool
from jaxmoe.config import LayerCacheSpec, cache_groups
from jaxmoe.families import read_config

from ..tiny.cases import CASES_BY_NAME

PAGE, CHUNK = 4, 8


def config_of(name: str):
    return read_config(CASES_BY_NAME[name].config)


def test_layers_are_grouped_by_the_kind_of_their_cache():
    config = config_of("gpt_oss_window")
    full, windowed = sorted(cache_groups(config.cache_specs), key=lambda spec: spec.is_windowed)
    assert full == LayerCacheSpec(head_dims=(config.head_dim, config.head_dim))
    assert windowed == dataclasses.replace(full, window=windowed.window)
    groups = cache_groups(config.cache_specs)
    assert sorted(groups[full] + groups[windowed]) == list(range(config.num_hidden_layers))
    assert [layer for layer, window in enumerate(config.sliding_windows) if window] == groups[windowed]


def test_latent_attention_caches_one_vector():
    config = config_of("deepseek_v3_groups")
    (spec,) = cache_groups(config.cache_specs)
    assert spec.head_dims == (config.mla.cached_dim,)
    assert spec.bytes_per_head(2) == 2 * config.mla.cached_dim
    assert spec.bytes_per_head(1, 4) == config.mla.cached_dim + 4


def test_chunked_and_full_layers_are_two_kinds():
    kinds = cache_groups(config_of("llama4_text_scout").cache_specs)
    assert sorted(spec.attention_chunk > 0 for spec in kinds) == [False, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    window=st.integers(1, 40), attention_chunk=st.sampled_from([0, 8, 12]), num_prompt=st.integers(1, 60),
    num_new=st.integers(0, 30),
)  # fmt: skip
def test_pages_of_each_kind_hold_what_its_layers_still_see(window, attention_chunk, num_prompt, num_new):
    """A request that grows, with a block table for each kind: a full one keeps every page, a windowed one its bound."""
    specs = [
        LayerCacheSpec(head_dims=(8, 8)),
        LayerCacheSpec(head_dims=(8, 8), window=window, attention_chunk=attention_chunk),
    ]
    pools = {
        spec: PagePool(num_pages=40, page_size=PAGE, first_visible=spec.first_visible if spec.is_windowed else None)
        for spec in cache_groups(specs)
    }
    tables: dict[LayerCacheSpec, dict[int, int]] = {spec: {} for spec in pools}  # page number of the request -> page
    most = dict.fromkeys(pools, 0)
    ends = [*range(CHUNK, num_prompt, CHUNK), num_prompt, *range(num_prompt + 1, num_prompt + num_new + 1)]
    start = 0
    for end in ends:
        for spec, pool in pools.items():
            table = tables[spec]
            for number in range(start // PAGE, -(-end // PAGE)):
                if number not in table:
                    (table[number],) = pool.allocate(1)
            most[spec] = max(most[spec], pool.num_in_use)
            seen = {position // PAGE for at in range(start, end) for position in range(spec.first_visible(at), at + 1)}
            assert seen <= set(table)
            behind = [number for number in table if (number + 1) * PAGE <= spec.first_visible(end)]
            pool.decref([table.pop(number) for number in behind])
        start = end
    full, windowed = pools
    assert set(tables[full]) == set(range(-(-end // PAGE)))
    for spec in pools:
        assert most[spec] <= spec.max_pages(end, page_size=PAGE, chunk_tokens=CHUNK)
    assert most[windowed] <= most[full]

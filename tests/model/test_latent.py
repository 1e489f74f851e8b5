"""Latent attention: absorbed over pages it is what keys and values of every head give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.families import read_config
from jaxmoe.model.attend import CausalAttention, PagedAttention, QueryBlocks, empty_pages
from jaxmoe.model.attention import ForwardContext
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.latent import LatentAttention
from jaxmoe.model.params import ParamFactory
from jaxmoe.model.rows import make_token_mask
from jaxmoe.model.transformer import layer_segments
from jaxmoe.ops.pointwise import inverse_frequencies, rotation
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes

from ..conftest import mesh_of
from ..tiny.cases import CASES_BY_NAME

LENGTH, PAGE_SIZE = 23, 4


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("deepseek_v2_groups", "data=1"),
        pytest.param("deepseek_v2_groups", "tensor=2", marks=pytest.mark.sweep),
        ("deepseek_v2_lite", "tensor=2"),
        pytest.param("deepseek_v2_lite", "data=1", marks=pytest.mark.sweep),
        ("deepseek_v3_halves", "tensor=2"),
        pytest.param("deepseek_v3_halves", "data=1", marks=pytest.mark.sweep),
    ],
)
def test_absorbed_attention_is_the_plain_form(name, mesh):
    """In chunks of 1, 9 and 13 tokens over pages, and all at once over keys and values of every head."""
    config = read_config(CASES_BY_NAME[name].config)
    placement = MeshPlacement(mesh=mesh_of(mesh))
    sizes, kernels = array_sizes(config, placement), KernelConfig()
    params = ParamFactory(nnx.Rngs(0), jnp.dtype("float32"), {"layer": 1}, stddev=0.3)
    block = LatentAttention(config, sizes, placement, kernels, 0, params=params)
    graph, weights = nnx.split(block)
    x = jax.random.normal(jax.random.key(1), (LENGTH, config.hidden_size))

    @jax.jit
    def scored(weights, x):
        return nnx.merge(graph, weights)(x[None], 0, make_context(0, (1, LENGTH), CausalAttention()), None, "token")[0][
            0
        ]

    @jax.jit
    def over_pages(weights, x, kv_cache, first):
        count = len(x)
        blocks = QueryBlocks(
            num_tokens=count,
            seq_slots=None,
            positions=jnp.full((1, 1), first),
            query_lens=jnp.full((1, 1), count, jnp.int32),
        )
        context = make_context(first, (count, 1), PagedAttention(jnp.arange(8)[None, None], [blocks], "loop"))
        y, kv_cache = nnx.merge(graph, weights)(x[:, None], 0, context, kv_cache, "token")
        return y[:, 0], kv_cache

    def make_context(first: int, rows: tuple[int, int], attention_backend) -> ForwardContext:
        positions = (first + jnp.arange(rows[0] * rows[1], dtype=jnp.int32)).reshape(rows)
        rotary = rotation(positions, inverse_frequencies(config.rope, config.rotary_dims))
        return ForwardContext(
            *rotary, make_token_mask(positions >= 0, positions, placement, count=False), attention_backend
        )

    plain = scored(weights, x)
    ((kv_cache,),) = empty_pages(
        config, [sizes], layer_segments(config, "scan")[:1], num_pages=8, page_size=PAGE_SIZE, dtype="float32"
    )
    assert len(kv_cache) == 1  # a latent, no values
    first, found = 0, []
    for count in (1, 9, 13):
        y, kv_cache = over_pages(weights, x[first : first + count], kv_cache, jnp.int32(first))
        found.append(y)
        first += count
    np.testing.assert_allclose(jnp.concatenate(found), plain, atol=2e-5)

"""Reference of paged attention: the keys and values of every row are gathered from its pages."""

from __future__ import annotations

import jax.numpy as jnp

from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.attention.reference import masked_attention
from jaxmoe.ops.paged_attention.pages import split_pages


def paged_attention(
    q, pages, block_table, positions, query_lens, layer=0, sinks=None, *, mask_spec: MaskSpec, value_dim=None
):
    """Define the result of ops.paged_attention. Outputs at padded positions are 0."""

    def gathered(pool, scales):  # [L,M,K,S,...] -> [N,P*S,K,...]
        numbers = pool[layer, block_table].astype(jnp.float32)
        numbers = numbers if scales is None else numbers * scales[layer, block_table][..., None]
        return numbers.swapaxes(2, 3).reshape(len(block_table), -1, pool.shape[2], pool.shape[4])

    k_pages, v_pages, k_scales, v_scales = split_pages(pages, value_dim)
    keys, values = gathered(k_pages, k_scales), gathered(v_pages, v_scales)[..., :value_dim]
    tokens, key_at = jnp.arange(q.shape[1]), jnp.arange(keys.shape[1])[None]
    query_at = positions[:, None] + tokens
    written = (key_at < (positions + query_lens)[:, None]) & (key_at >= mask_spec.first_visible(positions)[:, None])
    keys, values = (jnp.where(written[:, :, None, None], part, 0) for part in (keys, values))
    y = masked_attention(q, keys, values, query_at, key_at, sinks, mask_spec=mask_spec)
    return jnp.where((tokens < query_lens[:, None])[:, :, None, None, None], y, 0)

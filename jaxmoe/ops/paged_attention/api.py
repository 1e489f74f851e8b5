"""Paged attention: new tokens attend to keys and values in the pages of the KV cache.

New tokens are grouped in query blocks of one request each: one token for a decoding request, several for a prompt
chunk. A block attends to the pages in its row of the block table. Its own keys and values are already written there.
Pages may be quantized to 8 bits, with a scale per token and head. Key scales multiply attention scores, value scales
multiply attention weights.
Latent attention stores no values: the values are the first V numbers of the keys.
"""

# Dims: N query blocks, Q tokens of a block, P pages of a row, K key/value head slots, G query heads of a slot, H head
# dim of keys, V head dim of values.
from __future__ import annotations

from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention import MaskSpec
from jaxmoe.ops.paged_attention.backends import BACKENDS, PagedBackend
from jaxmoe.ops.paged_attention.pages import Pages
from jaxmoe.ops.stack import LayerIndex


def paged_attention(
    q: Float[Array, "N Q K G H"],
    pages: Pages,
    block_table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    query_lens: Int[Array, "N"],
    layer: LayerIndex = 0,
    sinks: Float[Array, "K G"] | None = None,
    *,
    mask_spec: MaskSpec,
    value_dim: int | None = None,
    backend: PagedBackend = "loop",
) -> Float[Array, "N Q K G V"]:
    """Attend from the first `query_lens` tokens of every query block to the cached tokens that the mask allows.

    positions: position of the first token of each block; the others follow it. layer: index of the layer to read.
    sinks: logits of attention sinks; they enter the softmax's denominator only. value_dim: V if attention is latent,
    else None. Outputs at padded positions are undefined.
    """
    kernel = BACKENDS[backend].kernels["paged_attention"]
    return kernel(q, pages, block_table, positions, query_lens, layer, sinks, mask_spec=mask_spec, value_dim=value_dim)

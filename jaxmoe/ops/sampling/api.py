"""Sample one token per row from logits.

Penalties and biases are applied first, then the token bitmask. Then the token is chosen greedily, or drawn at random
with temperature, top-k, top-p and min-p from the seed of its row.
"""

# Dims: B rows, V vocabulary, M pages of S tokens, P pages of a row.
from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.sampling.arrays import MAX_TOP, SamplerOutput, SamplingArrays, SamplingFeatures
from jaxmoe.ops.sampling.backends import BACKENDS, SamplingBackend


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingArrays,
    token_pages: Int[Array, "M S"],
    block_table: Int[Array, "B P"],
    positions: Int[Array, "B"],
    features: SamplingFeatures,
    *,
    backend: SamplingBackend = "xla",
) -> SamplerOutput:
    """Sample the next token of every row.

    positions: position of the new token. Earlier tokens of the row are read from token_pages through its block table.
    Random draws depend on the row's seed and position only, never on other rows of the batch.
    """
    logits = logits.astype(jnp.float32)
    num_top = min(MAX_TOP, logits.shape[-1])
    kernel = BACKENDS[backend].kernels["sample"]
    return kernel(logits, rows, token_pages, block_table, positions, features, num_top=num_top)

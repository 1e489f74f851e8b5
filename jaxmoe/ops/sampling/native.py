"""Sampling by a C++ kernel for CPUs (ops/native/sample.cc)."""

# Dims: B rows, V vocabulary, M pages of S tokens, P pages of a row.
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.sampling.arrays import SamplerOutput, SamplingArrays, SamplingFeatures


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingArrays,
    token_pages: Int[Array, "M S"],
    block_table: Int[Array, "B P"],
    positions: Int[Array, "B"],
    features: SamplingFeatures,
    *,
    num_top: int,
) -> SamplerOutput:
    """Compute ops.sampling. num_top: number of top tokens of a row."""
    flags = jnp.stack(features)
    one, many = (len(logits),), (len(logits), num_top)
    results = tuple(jax.ShapeDtypeStruct(shape, t) for shape in (one, many) for t in (jnp.int32, jnp.float32))
    call = jax.ffi.ffi_call("jaxmoe_sample", results)
    return SamplerOutput(*call(logits, token_pages, block_table, positions, flags, *rows))

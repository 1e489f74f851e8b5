"""Parts of the compiled programs that need no weights of their own: state, output, sampling, scoring."""

# Dims: B rows (padded to the mesh), S prompt bucket, V vocabulary; r ranks of the batch, each with d rows; T decode
# steps, L top log-probabilities.
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.engine.batch import FLOAT_PARTS
from jaxmoe.model.attend import TOKEN_PAGE_DIMS, DensePrefillInputs, KVPages
from jaxmoe.model.transformer import TokensPerExpert, TransformerModel
from jaxmoe.ops.sampling import MAX_TOP, SamplerOutput, SamplingArrays, SamplingBackend, SamplingFeatures, sample
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import PipelineSchedule

_SCORE_POSITIONS = 256


def _last_hidden(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Select the last token of each row of hidden [B,S,D]: [B,1,D]."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)


class EngineState(NamedTuple):
    """Hold the device state carried between steps.

    tokens: last token of every row [r, rows]. pages: KV pages. token_pages: token ids of the pages [pages, page_size].
    """

    tokens: jax.Array
    pages: KVPages
    token_pages: jax.Array


class StepOutput(NamedTuple):
    """Hold the output of one step.

    sampled: sampled tokens of each decode step and row, arrays [T,r,d] and [T,r,d,L]. tokens_per_expert: tokens routed
    to each physical expert, summed over the decode steps, as in ForwardState; None unless traced.
    """

    sampled: SamplerOutput
    tokens_per_expert: TokensPerExpert | None


def output_buffers(
    max_decode_steps: int, num_ranks: int, micro_batches: int, seq_slots: int, *, vocab_size: int
) -> tuple[jax.Array, ...]:
    """Allocate buffers for sampled tokens, by decode step, rank, micro-batch and row."""
    per_row, top = (max_decode_steps, num_ranks, micro_batches, seq_slots // micro_batches), min(MAX_TOP, vocab_size)
    return (
        jnp.zeros(per_row, jnp.int32), jnp.zeros(per_row), jnp.zeros((*per_row, top), jnp.int32),
        jnp.zeros((*per_row, top)),
    )  # fmt: skip


def sample_logits(
    logits: jax.Array, metadata, token_pages: jax.Array, positions: jax.Array, features: SamplingFeatures,
    *, placement: MeshPlacement, backend: SamplingBackend,
) -> SamplerOutput:  # fmt: skip
    """Sample one token per row, on the rank of the row. logits [r,d,V]; positions [r,d] of the new tokens."""
    values = {name: metadata[name] for name in SamplingArrays._fields}
    for name in FLOAT_PARTS:
        values[name] = jax.lax.bitcast_convert_type(values[name], jnp.float32)
    for name in ("seed", "seed_high"):
        values[name] = jax.lax.bitcast_convert_type(values[name], jnp.uint32)
    names = list(values)

    def on_rank(logits, token_pages, block_table, positions, features, *arrays):
        rows = SamplingArrays(**{name: array[0] for name, array in zip(names, arrays, strict=True)})
        sampled = sample(
            logits[0], rows, token_pages, block_table[0], positions[0], SamplingFeatures(*features), backend=backend
        )
        return tuple(part[None] for part in sampled)

    per_row = ("batch", "block")
    sampled = placement.shard_map_local(
        on_rank,
        (logits, (*per_row, "unsharded")), (token_pages, TOKEN_PAGE_DIMS),
        (metadata["block_table"], (*per_row, "unsharded")),
        (positions, per_row), (jnp.stack(features), ("unsharded",)),
        *((values[name], (*per_row, "unsharded")[: values[name].ndim]) for name in names),
        out=(per_row, per_row, (*per_row, "unsharded"), (*per_row, "unsharded")),
    )  # fmt: skip
    return SamplerOutput(*sampled)


def score_prompts(
    model: TransformerModel, tokens: jax.Array, lengths: jax.Array, *, schedule: PipelineSchedule
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities [B,S] of the token after each position, and the logits [B,V] after the last one."""
    placement = model.placement
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    step_inputs = DensePrefillInputs(valid=positions < lengths[:, None], num_ranks=placement.num_shards("batch"))
    hidden, *_ = model(tokens, step_inputs, schedule=schedule)
    target = jnp.roll(tokens, -1, axis=1)
    strips = []
    for start in range(0, tokens.shape[1], _SCORE_POSITIONS):  # in parts, to bound the memory of the logits
        part = slice(start, start + _SCORE_POSITIONS)
        logits = model.logits(hidden[:, part])
        logits = placement.constrain(logits, "batch", "length", "unsharded")
        picked = jnp.take_along_axis(logits, target[:, part, None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        strips.append(picked - jnp.where(jnp.isfinite(total), total, jnp.nan))
    logits = model.logits(_last_hidden(hidden, lengths))[:, 0, : model.config.vocab_size]
    return jnp.concatenate(strips, axis=1), placement.constrain(logits, "batch", "unsharded")

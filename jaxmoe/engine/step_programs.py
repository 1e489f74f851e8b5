"""Parts of the compiled programs that need no weights of their own: state, output, sampling, scoring."""

# Dims: B rows (padded to the mesh), S prompt bucket, V vocabulary; r ranks of the batch, each with d rows; T decode
# steps, K sampled tokens of a row in one pass, L top log-probabilities.
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    sampled: tokens of every row in the order in which they were sampled, arrays [T,r,d] and [T,r,d,L]. T is the number
    of decode steps, or in a single step logits_per_slot of its bucket. tokens_per_expert: tokens routed to each
    physical expert, summed over the decode steps, as in ForwardState; None unless traced.
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


def output_size(decode_steps: int, num_rows: int, *, vocab_size: int) -> int:
    """Return the bytes of a step's sampled tokens, of num_rows rows over all ranks."""
    return decode_steps * num_rows * (2 + 2 * min(MAX_TOP, vocab_size)) * 4


def for_every_process(output: StepOutput, placement: MeshPlacement) -> StepOutput:
    """Return the output of a step such that every process holds all of it. Unchanged on a mesh of one process.

    The sampled tokens take one all-gather over the ranks of the batch, counts of tokens per expert one for each array.
    """
    if not placement.spans_processes:
        return output
    sampled = output.sampled
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in sampled]
    widths = [part[..., None] if part.ndim == sampled.tokens.ndim else part for part in bits]
    together = placement.constrain(jnp.concatenate(widths, axis=-1), *("unsharded",) * (sampled.tokens.ndim + 1))
    tokens, logprobs, top_tokens, top_logprobs = jnp.split(together, np.cumsum([w.shape[-1] for w in widths])[:-1], -1)
    as_float = lambda part: jax.lax.bitcast_convert_type(part, jnp.float32)  # noqa: E731
    sampled = SamplerOutput(tokens[..., 0], as_float(logprobs[..., 0]), top_tokens, as_float(top_logprobs))
    counts = jax.tree.map(lambda x: placement.constrain(x, *("unsharded",) * x.ndim), output.tokens_per_expert)
    return StepOutput(sampled, counts)


def sample_logits(
    logits: jax.Array, metadata, token_pages: jax.Array, positions: jax.Array, features: SamplingFeatures,
    *, placement: MeshPlacement, backend: SamplingBackend,
) -> SamplerOutput:  # fmt: skip
    """Sample K tokens per row, on the rank of the row: arrays [K,r,d] and [K,r,d,L].

    logits [r,d,K,V]. positions [r,d,K]: of the new tokens. The K tokens of a row share its sampling parameters.
    """
    values = {name: metadata[name] for name in SamplingArrays._fields}
    for name in FLOAT_PARTS:
        values[name] = jax.lax.bitcast_convert_type(values[name], jnp.float32)
    for name in ("seed", "seed_high"):
        values[name] = jax.lax.bitcast_convert_type(values[name], jnp.uint32)
    names = list(values)

    def on_rank(logits, token_pages, block_table, positions, features, *arrays):
        each = lambda array: jnp.repeat(array[0], logits.shape[2], axis=0)  # noqa: E731
        flat = lambda array: array.reshape(-1, *array.shape[3:])  # noqa: E731
        own = dict(zip(names, arrays, strict=True))
        rows = SamplingArrays(
            **{name: flat(array) if name == "token_bitmask" else each(array) for name, array in own.items()}
        )
        sampled = sample(
            flat(logits), rows, token_pages, each(block_table), flat(positions), SamplingFeatures(*features),
            backend=backend,
        )  # fmt: skip
        return tuple(jnp.moveaxis(part.reshape(*logits.shape[:3], *part.shape[1:]), 2, 0) for part in sampled)

    per_row, per_token = ("batch", "block"), ("batch", "block", "unsharded")
    sampled = placement.shard_map_local(
        on_rank,
        (logits, (*per_token, "unsharded")), (token_pages, TOKEN_PAGE_DIMS),
        (metadata["block_table"], (*per_row, "unsharded")),
        (positions, per_token), (jnp.stack(features), ("unsharded",)),
        *((values[name], (*per_token, "unsharded")[: values[name].ndim]) for name in names),
        out=(("unsharded", *per_row),) * 2 + (("unsharded", *per_token),) * 2,
    )  # fmt: skip
    return SamplerOutput(*sampled)


def sampled_positions(metadata) -> jax.Array:
    """Return the position [r,d,K] of the token before each token that a row samples, by logits_indices [r,d,K]."""
    indices = metadata["logits_indices"]
    num_sampled = jnp.sum(indices >= 0, axis=-1, keepdims=True)
    return metadata["positions"][..., None] + jnp.arange(indices.shape[-1]) - jnp.maximum(num_sampled - 1, 0)


def last_sampled(sampled: SamplerOutput, metadata, otherwise: jax.Array) -> jax.Array:
    """Return the last sampled token of every row [r,d]; `otherwise` [r,d] of rows that sample none."""
    for index, tokens in enumerate(sampled.tokens):
        otherwise = jnp.where(metadata["logits_indices"][..., index] >= 0, tokens, otherwise)
    return otherwise


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
    scores = jnp.concatenate(strips, axis=1)
    if placement.spans_processes:  # process 0 needs all of them
        return placement.constrain(scores, "unsharded", "unsharded"), placement.constrain(logits, *("unsharded",) * 2)
    return scores, placement.constrain(logits, "batch", "unsharded")

"""The ways queries meet keys: within a prompt, or over pages into which the new keys are written first."""

# Dims: B batch, S length, K key/value head slots, G query heads a slot, H head dim, V that of values; r ranks of the
# batch, each with t tokens, n blocks of them, d rows of the block table with p pages each.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.model.attention import LayerInputs
from jaxmoe.model.rows import KEY_DIMS, QUERY_DIMS
from jaxmoe.ops.attention import MaskSpec, causal_attention
from jaxmoe.ops.paged import (
    ContextShard,
    PagedBackend,
    Pages,
    merge_attention,
    paged_attention,
    partial_attention,
    write_pages,
)
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import Placement
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.formats import QMAX

# Of every segment, of every block: keys and values of its layers (of latent attention keys alone), and their scales
# where kept in eight bits.
KVPages = Sequence[tuple[Pages, ...]]
PAGE_DIMS = ("layer", "page", "kv_head", "page_token", "head_dim")
TOKEN_PAGE_DIMS = ("page", "unsharded")
_BLOCK_TABLE_DIMS = ("batch", "block", "unsharded")
T = TypeVar("T")


def empty_pages(
    config: ModelConfig, sizes: Sequence[ArraySizes], segments: Sequence[LayerSegment], *,
    num_pages: int, page_size: int, dtype: str,
) -> KVPages:  # fmt: skip
    """Keys and values [L,num_pages,K,page_size,H] of every block, L its slots, all zero. num_pages: of all ranks.
    sizes: of the layers of each segment.

    In eight bits, scales [L,num_pages,K,page_size] of each follow.
    """

    def block(layers: int, kv_slots: int) -> Pages:
        shape = (layers, num_pages, kv_slots, page_size)
        numbers = tuple(jnp.zeros((*shape, dim), dtype) for dim in config.cached_dims)
        return (*numbers, *(jnp.zeros(shape) for _ in numbers)) if dtype in QMAX else numbers

    return [
        tuple(block(segment.slots, size.kv_slots) for _ in range(segment.period))
        for segment, size in zip(segments, sizes, strict=True)
    ]


def split_rows(array: Any, micro_batch: Any, of: int) -> Any:
    """array [r,n,...] -> [r,n/of,...]: one of `of` even parts of every rank's entries."""
    if array is None or of == 1:
        return array
    parts = array.reshape(array.shape[0], of, -1, *array.shape[2:])
    return jax.lax.dynamic_index_in_dim(parts, jnp.minimum(micro_batch, of - 1), axis=1, keepdims=False)


def micro_batch_of(array: jax.Array, micro_batch: Any, of: int, num_ranks: int) -> jax.Array:
    """array [r*n,...] -> [r*n/of,...]: one of `of` even parts of every rank's rows; past the last: the last."""
    if of == 1:
        return array
    parts = split_rows(array.reshape(num_ranks, -1, *array.shape[1:]), micro_batch, of)
    return parts.reshape(-1, *array.shape[1:])


class CausalAttention:
    """Every token over those before it; nothing kept. Rows and heads are independent, so each device does its own."""

    uses_kv_cache = False

    def __call__(
        self, kv_cache: None, layer: LayerIndex, q: jax.Array, k: jax.Array, v: jax.Array | None, *,
        mask_spec: MaskSpec,
        sinks: jax.Array | None, placement: Placement, value_dim: int | None = None,
    ) -> tuple[jax.Array, None]:  # fmt: skip
        """See AttentionBackend. Values are given."""
        del layer, value_dim
        assert v is not None
        attend = partial(causal_attention, mask_spec=mask_spec)
        arrays = [(q, QUERY_DIMS), (k, KEY_DIMS), (v, KEY_DIMS), *_sinks_with_dims(sinks)]
        return placement.shard_map_local(attend, *arrays, out=QUERY_DIMS), kv_cache


def _sinks_with_dims(sinks: jax.Array | None) -> list[tuple[jax.Array, tuple[str, ...]]]:
    return [] if sinks is None else [(sinks, ("kv_head", "head_slot"))]


def _register(data: Sequence[str], meta: Sequence[str] = ()) -> Callable[[type[T]], type[T]]:
    return lambda cls: jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=list(meta))


@_register(["valid"], ["num_ranks"])
@dataclass(frozen=True, kw_only=True)
class DensePrefillInputs:
    """Whole prompts, of which nothing is kept. valid [B,S]: False for padding."""

    valid: jax.Array
    num_ranks: int

    def part(self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True) -> LayerInputs:
        """See StepInputs. There is one decode step."""
        del decode_step
        valid = micro_batch_of(self.valid, micro_batch, of, self.num_ranks) & slot_valid
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
        return LayerInputs(positions, valid, CausalAttention())


@_register(["seq_slots", "positions", "query_lens"], ["num_tokens"])
@dataclass(frozen=True, kw_only=True)
class QueryBlocks:
    """A rank's tokens as blocks of one request each, num_tokens long: which row, where they stand, how many are real.

    seq_slots [r,n]: the row of the block table a block belongs to; None where block i belongs to row i. positions
    [r,n]: of its first token. query_lens [r,n]: tokens it has, over all decode steps; in every one it has the next
    num_tokens of them.
    """

    num_tokens: int
    seq_slots: jax.Array | None
    positions: jax.Array
    query_lens: jax.Array

    def part(self, micro_batch: Any, of: int, decode_step: Any, slot_valid: Any) -> QueryBlocks:
        """The blocks of one micro-batch in one decode step, none of them real unless slot_valid."""
        seq_slots = self.seq_slots
        if seq_slots is None and of > 1:
            seq_slots = jnp.broadcast_to(jnp.arange(self.query_lens.shape[1], dtype=jnp.int32), self.query_lens.shape)
        seq_slots, positions, query_lens = (
            split_rows(part, micro_batch, of) for part in (seq_slots, self.positions, self.query_lens)
        )
        done = decode_step * self.num_tokens
        query_lens = jnp.where(slot_valid, jnp.clip(query_lens - done, 0, self.num_tokens), 0)
        return replace(self, seq_slots=seq_slots, positions=positions + done, query_lens=query_lens)


@_register(["block_table", "query_blocks"], ["backend"])
@dataclass(frozen=True, kw_only=True)
class PagedStepInputs:
    """New tokens [r*t,1] over pages: those of every rank's query blocks, one kind after the other.

    block_table [r,d,p]: the pages of every row.
    """

    block_table: jax.Array
    query_blocks: tuple[QueryBlocks, ...]
    backend: PagedBackend

    def attention_backend(
        self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True
    ) -> PagedAttention:
        """How the tokens of `part` meet the pages."""
        return PagedAttention(
            self.block_table,
            [s.part(micro_batch, of, decode_step, slot_valid) for s in self.query_blocks],
            self.backend,
        )

    def part(self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True) -> LayerInputs:
        """See StepInputs."""
        attention_backend = self.attention_backend(micro_batch, of, decode_step, slot_valid)
        return LayerInputs(*attention_backend.token_positions(), attention_backend)


class PagedAttention:
    """Attention of new tokens over pages; what it keeps are the pages of a block's layers."""

    uses_kv_cache = True

    def __init__(self, block_table: jax.Array, query_blocks: Sequence[QueryBlocks], backend: PagedBackend) -> None:
        self._block_table, self._query_blocks, self._backend = block_table, tuple(query_blocks), backend

    def token_positions(self) -> tuple[jax.Array, jax.Array]:
        """Where the tokens stand [r*t,1], and which of them are real."""
        positions, valid = [], []
        for blocks in self._query_blocks:
            each = jnp.arange(blocks.num_tokens, dtype=jnp.int32)
            ranks = blocks.query_lens.shape[0]
            positions.append((blocks.positions[..., None] + each).reshape(ranks, -1))
            valid.append((each < blocks.query_lens[..., None]).reshape(ranks, -1))
        return jnp.concatenate(positions, axis=1).reshape(-1, 1), jnp.concatenate(valid, axis=1).reshape(-1, 1)

    def _metadata(self) -> list[tuple[jax.Array, tuple[str, ...]]]:
        """The arrays that say where things are, with their dims."""
        arrays = [
            part for blocks in self._query_blocks for part in (blocks.seq_slots, blocks.positions, blocks.query_lens)
            if part is not None
        ]  # fmt: skip
        return [(self._block_table, _BLOCK_TABLE_DIMS), *((array, ("batch", "block")) for array in arrays)]

    def _layout(self) -> tuple[tuple[int, bool], ...]:
        return tuple((blocks.num_tokens, blocks.seq_slots is not None) for blocks in self._query_blocks)

    def __call__(
        self, kv_cache: Pages, layer: LayerIndex, q: jax.Array, k: jax.Array, v: jax.Array | None, *,
        mask_spec: MaskSpec,
        sinks: jax.Array | None, placement: Placement, value_dim: int | None = None,
    ) -> tuple[jax.Array, Pages]:  # fmt: skip
        """See AttentionBackend."""
        dims = tuple(PAGE_DIMS[: array.ndim] for array in kv_cache)
        how = partial(paged_attention, backend=self._backend)
        over = partial(_over_pages, attend=how)
        if placement.num_shards("page_token") > 1:
            over = partial(
                _over_shared_pages, axes=placement.axes("page_token"), ranks=placement.num_shards("page_token")
            )
        new = [(one, KEY_DIMS) for one in (k, v) if one is not None]
        own = _sinks_with_dims(sinks)
        array_counts = ArrayCounts(new=len(new), pages=len(kv_cache), sinks=len(own))
        mixed, *pages = placement.shard_map_local(
            partial(over, layout=self._layout(), array_counts=array_counts, mask_spec=mask_spec, value_dim=value_dim),
            (q, QUERY_DIMS), (jnp.int32(layer), ()), *new, *zip(kv_cache, dims, strict=True), *own, *self._metadata(),
            out=(QUERY_DIMS, *dims),
        )  # fmt: skip
        return mixed, tuple(pages)

    def write_tokens(self, token_pages: jax.Array, tokens: jax.Array, placement: Placement) -> jax.Array:
        """token_pages [pages,page_size] with the ids of these tokens [r*t,1] at their places."""

        def write(token_pages, tokens, *metadata):
            block_table, query_blocks = _split_metadata(metadata, self._layout())
            page, offset = _slot_mapping(
                block_table, query_blocks, page_size=token_pages.shape[1], num_pages=token_pages.shape[0]
            )
            return token_pages.at[page, offset].set(tokens[:, 0], mode="drop")

        return placement.shard_map_local(
            write, (token_pages, TOKEN_PAGE_DIMS), (tokens, ("batch", "length")), *self._metadata(), out=TOKEN_PAGE_DIMS
        )


def _split_metadata(metadata, layout):
    """One rank's block_table [d,p], and for each kind of query blocks its length, block_table, positions and
    query_lens."""
    parts = iter(part[0] for part in metadata)
    block_table = next(parts)
    query_blocks = []
    for length, has_slots in layout:
        own = block_table[next(parts)] if has_slots else block_table
        query_blocks.append((length, own, next(parts), next(parts)))
    return block_table, query_blocks


def _slot_mapping(block_table, query_blocks, *, page_size, num_pages):
    """Page and offset of every token of one rank; a page past the last for those that are not real."""
    page, offset = [], []
    for length, block_table, positions, query_lens in query_blocks:
        token_positions = positions[:, None] + jnp.arange(length)
        valid = jnp.arange(length) < query_lens[:, None]
        own = jnp.take_along_axis(
            block_table, jnp.clip(token_positions // page_size, 0, block_table.shape[1] - 1), axis=1
        )
        page.append(jnp.where(valid, own, num_pages).reshape(-1))
        offset.append((token_positions % page_size).reshape(-1))
    return jnp.concatenate(page), jnp.concatenate(offset)


class ArrayCounts(NamedTuple):
    """How many of the arrays that follow each other are what: keys and values of new tokens, pages, sinks."""

    new: int
    pages: int
    sinks: int

    def split(self, arrays: Sequence[jax.Array]) -> tuple[Sequence[jax.Array], ...]:
        """Each kind, and what is left."""
        ends = list(accumulate(self))
        return *(arrays[end - count : end] for end, count in zip(ends, self, strict=True)), arrays[ends[-1] :]


def _over_pages(q, layer, *arrays, layout, array_counts, mask_spec, value_dim, attend, shard=ContextShard()):
    """One rank's part: q [t,1,K,G,H], `layer` of its pages; new keys (and values) [t,1,K,H], the pages, sinks [K,G]
    where there are any, and what tells where things are."""
    new, pages, sinks, metadata = array_counts.split(arrays)
    block_table, query_blocks = _split_metadata(metadata, layout)
    here = pages[0].shape[3]
    page, offset = _slot_mapping(
        block_table, query_blocks, page_size=here * shard.num_ranks, num_pages=pages[0].shape[1]
    )
    if shard.num_ranks > 1:
        page = jnp.where(offset // here == shard.rank, page, pages[0].shape[1])
        offset = offset % here
    pages = write_pages(pages, [one[:, 0] for one in new], page, offset, layer)
    mixed, start = [], 0
    for length, block_table, positions, query_lens in query_blocks:
        stop = start + length * block_table.shape[0]
        part = q[start:stop].reshape(-1, length, *q.shape[2:])
        part = attend(
            part, pages, block_table, positions, query_lens, layer, *sinks, mask_spec=mask_spec, value_dim=value_dim
        )
        mixed.append(part.reshape(stop - start, 1, *part.shape[2:]))
        start = stop
    return jnp.concatenate(mixed), *pages


def _over_shared_pages(q, layer, *arrays, axes, ranks, array_counts, **how):
    """The same where ranks along axes have other tokens [t/C,...] and another part of every page each: all attend for
    all tokens to what they have, and each merges what they found for its own."""
    new, pages, sinks, metadata = array_counts.split(arrays)
    together = jnp.concatenate([q, *(one[:, :, :, None] for one in new)], axis=3)
    together = jax.lax.all_gather(together, axes, axis=0, tiled=True)
    group = q.shape[3]
    new = [together[:, :, :, group + number] for number in range(len(new))]
    shard = ContextShard(jax.lax.axis_index(axes), ranks)
    parts, *pages = _over_pages(
        together[:, :, :, :group], layer, *new, *pages, *metadata, array_counts=array_counts._replace(sinks=0), **how,
        attend=partial(partial_attention, shard=shard), shard=shard,
    )  # fmt: skip
    parts = parts.reshape(ranks, -1, *parts.shape[2:])
    parts = jax.lax.all_to_all(parts, axes, split_axis=0, concat_axis=0, tiled=True)
    return merge_attention(parts, *sinks)[:, None].astype(q.dtype), *pages

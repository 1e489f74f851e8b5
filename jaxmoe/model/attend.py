"""Attention backends: causal within a prompt, or over a paged KV cache, into which new keys are written first."""

# Dims: B batch, S length, K key/value head slots, G query heads per slot, H head dim, V value dim; r ranks of the
# batch, each with t tokens, n blocks of them, d rows of the block table with p pages each; C context-parallel ranks.
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
from jaxmoe.ops.paged_attention import (
    ContextShard,
    PagedBackend,
    Pages,
    merge_attention,
    paged_attention,
    partial_attention,
    write_pages,
)
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.formats import QMAX

# KV cache pages by segment and block: keys and values of its layers (only keys for latent attention), and their scales
# if stored in eight bits.
KVPages = Sequence[tuple[Pages, ...]]
PAGE_DIMS = ("layer", "page", "kv_head", "page_token", "head_dim")
TOKEN_PAGE_DIMS = ("page", "unsharded")
_BLOCK_TABLE_DIMS = ("batch", "block", "unsharded")
T = TypeVar("T")


def empty_pages(
    config: ModelConfig, sizes: Sequence[ArraySizes], segments: Sequence[LayerSegment], *,
    num_pages: int, page_size: int, dtype: str,
) -> KVPages:  # fmt: skip
    """Return zeroed KV pages [L,num_pages,K,page_size,H] for every block of every segment, with L its number of slots.

    num_pages: total over all ranks. sizes: array sizes of the layers of each segment. If dtype has eight bits, scales
    [L,num_pages,K,page_size] follow.
    """

    def block(layer: int, slots: int, kv_slots: int) -> Pages:
        shape = (slots, num_pages, kv_slots, page_size)
        numbers = tuple(jnp.zeros((*shape, dim), dtype) for dim in config.cache_spec(layer).head_dims)
        return (*numbers, *(jnp.zeros(shape) for _ in numbers)) if dtype in QMAX else numbers

    return [
        tuple(block(segment.first + number, segment.slots, size.kv_slots) for number in range(segment.period))
        for segment, size in zip(segments, sizes, strict=True)
    ]


def split_rows(array: Any, micro_batch: Any, of: int) -> Any:
    """Return one of `of` equal parts of every rank's entries: array [r,n,...] -> [r,n/of,...]."""
    if array is None or of == 1:
        return array
    parts = array.reshape(array.shape[0], of, -1, *array.shape[2:])
    return jax.lax.dynamic_index_in_dim(parts, jnp.minimum(micro_batch, of - 1), axis=1, keepdims=False)


def micro_batch_of(array: jax.Array, micro_batch: Any, of: int, num_ranks: int) -> jax.Array:
    """Return one of `of` equal parts of every rank's rows: array [r*n,...] -> [r*n/of,...].

    An index past the last part gives the last part.
    """
    if of == 1:
        return array
    parts = split_rows(array.reshape(num_ranks, -1, *array.shape[1:]), micro_batch, of)
    return parts.reshape(-1, *array.shape[1:])


class CausalAttention:
    """Attend from every token to itself and the tokens before it, without a KV cache.

    Rows and heads are independent, so each device computes its own.
    """

    uses_kv_cache = False

    def __call__(
        self, kv_cache: None, layer: LayerIndex, q: jax.Array, k: jax.Array, v: jax.Array | None, *,
        mask_spec: MaskSpec,
        sinks: jax.Array | None, placement: MeshPlacement, value_dim: int | None = None,
    ) -> tuple[jax.Array, None]:  # fmt: skip
        """Compute attention as AttentionBackend describes. v must be given."""
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
    """Hold whole prompts whose keys and values are not cached. valid [B,S]: False for padding."""

    valid: jax.Array
    num_ranks: int

    def part(self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True) -> LayerInputs:
        """Return the layer inputs of a micro-batch (see StepInputs). There is one decode step."""
        del decode_step
        valid = micro_batch_of(self.valid, micro_batch, of, self.num_ranks) & slot_valid
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
        return LayerInputs(positions, valid, CausalAttention())


@_register(["seq_slots", "positions", "query_lens"], ["num_tokens"])
@dataclass(frozen=True, kw_only=True)
class QueryBlocks:
    """Hold a rank's new tokens as blocks of one request each, all num_tokens long.

    seq_slots [r,n]: row of the block table that a block belongs to; None if block i belongs to row i. positions [r,n]:
    position of a block's first token. query_lens [r,n]: valid tokens of a block over all decode steps. Every decode
    step takes the next num_tokens of them.
    """

    num_tokens: int
    seq_slots: jax.Array | None
    positions: jax.Array
    query_lens: jax.Array

    def part(self, micro_batch: Any, of: int, decode_step: Any, slot_valid: Any) -> QueryBlocks:
        """Return the blocks of one micro-batch at one decode step. All tokens are masked unless slot_valid."""
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
    """Hold new tokens [r*t,1] that attend over KV pages: every rank's query blocks, one kind after the other.

    block_table [r,d,p]: the pages of every row.
    """

    block_table: jax.Array
    query_blocks: tuple[QueryBlocks, ...]
    backend: PagedBackend

    def attention_backend(
        self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True
    ) -> PagedAttention:
        """Return the attention backend for the tokens of `part`."""
        return PagedAttention(
            self.block_table,
            [s.part(micro_batch, of, decode_step, slot_valid) for s in self.query_blocks],
            self.backend,
        )

    def part(self, micro_batch: Any, of: int, decode_step: Any = 0, slot_valid: Any = True) -> LayerInputs:
        """Return the layer inputs of a micro-batch at one decode step (see StepInputs)."""
        attention_backend = self.attention_backend(micro_batch, of, decode_step, slot_valid)
        return LayerInputs(*attention_backend.token_positions(), attention_backend)


class PagedAttention:
    """Compute attention of new tokens over KV pages. Its kv_cache holds the pages of a block's layers."""

    uses_kv_cache = True

    def __init__(self, block_table: jax.Array, query_blocks: Sequence[QueryBlocks], backend: PagedBackend) -> None:
        self._block_table, self._query_blocks, self._backend = block_table, tuple(query_blocks), backend

    def token_positions(self) -> tuple[jax.Array, jax.Array]:
        """Return the positions [r*t,1] of the tokens, and which of them are valid [r*t,1]."""
        positions, valid = [], []
        for blocks in self._query_blocks:
            each = jnp.arange(blocks.num_tokens, dtype=jnp.int32)
            ranks = blocks.query_lens.shape[0]
            positions.append((blocks.positions[..., None] + each).reshape(ranks, -1))
            valid.append((each < blocks.query_lens[..., None]).reshape(ranks, -1))
        return jnp.concatenate(positions, axis=1).reshape(-1, 1), jnp.concatenate(valid, axis=1).reshape(-1, 1)

    def _metadata(self) -> list[tuple[jax.Array, tuple[str, ...]]]:
        """Return the block table and the arrays of the query blocks, with their logical dims."""
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
        sinks: jax.Array | None, placement: MeshPlacement, value_dim: int | None = None,
    ) -> tuple[jax.Array, Pages]:  # fmt: skip
        """Compute attention as AttentionBackend describes."""
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

    def write_tokens(self, token_pages: jax.Array, tokens: jax.Array, placement: MeshPlacement) -> jax.Array:
        """Write the ids of tokens [r*t,1] into token_pages [pages,page_size] by their slot mapping."""

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
    """Split one rank's metadata into the block table [d,p] and a tuple for each kind of query blocks.

    A tuple holds length, block_table, positions and query_lens.
    """
    parts = iter(part[0] for part in metadata)
    block_table = next(parts)
    query_blocks = []
    for length, has_slots in layout:
        own = block_table[next(parts)] if has_slots else block_table
        query_blocks.append((length, own, next(parts), next(parts)))
    return block_table, query_blocks


def _slot_mapping(block_table, query_blocks, *, page_size, num_pages):
    """Return page and offset of every token of one rank. Padding tokens get a page past the last one."""
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
    """Count the arrays of each kind in an argument list: new keys and values, KV pages, sinks."""

    new: int
    pages: int
    sinks: int

    def split(self, arrays: Sequence[jax.Array]) -> tuple[Sequence[jax.Array], ...]:
        """Split arrays by kind, followed by the remaining arrays."""
        ends = list(accumulate(self))
        return *(arrays[end - count : end] for end, count in zip(ends, self, strict=True)), arrays[ends[-1] :]


def _over_pages(q, layer, *arrays, layout, array_counts, mask_spec, value_dim, attend, shard=ContextShard()):
    """Compute one rank's part: write new keys and values to the pages, then attend to them.

    q [t,1,K,G,H]. layer: index into the pages. arrays: new keys (and values) [t,1,K,H], the pages, sinks [K,G] if any,
    and the metadata. Return the output and the new pages.
    """
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
    """Compute one rank's part under context parallelism.

    Ranks along axes have different tokens [t/C,...] and a different part of every page each. All ranks attend for all
    tokens to their own part of the pages. Each rank then merges the results for its own tokens.
    """
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

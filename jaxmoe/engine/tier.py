"""Offload of KV pages to host memory: copied out on eviction, swapped in when a prompt matches them."""

# Dims: r ranks of the batch, L layers, K key/value head slots, S tokens of a page, H head dim.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxmoe.cache.pages import PageCopy
from jaxmoe.engine.runner import Runner
from jaxmoe.engine.step_programs import EngineState
from jaxmoe.model.attend import PAGE_DIMS, TOKEN_PAGE_DIMS
from jaxmoe.quantization.formats import QMAX

# Dims of one page of every rank, for layers of one pipeline view: keys and values, their scales, and token ids.
_NUMBERS = ("batch", "layer", "unsharded", "kv_head", "page_token", "head_dim")
_SCALES = _NUMBERS[:-1]
_TOKENS = ("batch", "unsharded")
_HOST_MEMORY = "pinned_host"


class HostOffload:
    """Copy pages to and from host memory. Copies are queued on the devices in call order, after earlier steps."""

    def __init__(self, runner: Runner) -> None:
        self._placement = runner.placement
        self._each = len(runner.config.cached_dims)  # arrays per kind: keys and values, or only keys
        kinds = (_NUMBERS, _SCALES) if runner.kv_dtype in QMAX else (_NUMBERS,)
        self._kinds, self._width = kinds, len(kinds) * self._each  # arrays per block
        held = [runner.placement.for_params(segment) for segment in runner.segments for _ in range(segment.period)]
        views = dict.fromkeys(placement.view for placement in held)
        self._groups = [
            (self._placement.with_view(view), [block for block, placement in enumerate(held) if placement.view == view])
            for view in views
        ]
        self._shardings = [placement.sharding(*dims) for placement, _ in self._groups for dims in kinds]
        self._shardings.append(self._placement.sharding(*_TOKENS))
        self._host_pages: dict[tuple[int, int], list[dict[Any, jax.Array]]] = {}
        self._zeros: list[dict[Any, jax.Array]] | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._read_fn = jax.jit(self._read)
        self._write_fn = jax.jit(self._write, donate_argnums=(0,))

    def clear(self) -> None:
        """Drop all host pages."""
        self._host_pages.clear()

    def __len__(self) -> int:
        return len(self._host_pages)

    # --- programs: one page of each rank ---

    def _arrays(self, state: EngineState, blocks: list[int]) -> tuple[list[jax.Array], list[tuple[str, ...]]]:
        """Return the page arrays of some blocks as a flat list, and their dims."""
        leaves = jax.tree.leaves(state.pages)
        arrays = [leaves[block * self._width + which] for block in blocks for which in range(self._width)]
        return arrays, [PAGE_DIMS[: array.ndim] for array in arrays]

    def _read(self, state: EngineState, page: jax.Array):
        """Read page [r] of each rank.

        Returns, for every group of layers, keys and values [r,L,2,K,S,H] and, if quantized, their scales [r,L,2,K,S];
        the last array is the token ids [r,S]. The dim of 2 is 1 if the cache has only keys.
        """

        def on_rank(page, *arrays):
            taken = [jax.lax.dynamic_index_in_dim(array, page[0], axis=1, keepdims=False) for array in arrays]
            kinds = [jnp.concatenate(taken[which :: self._width]) for which in range(self._width)]  # of all layers
            starts = range(0, self._width, self._each)
            return tuple(jnp.stack(kinds[at : at + self._each], axis=1)[None] for at in starts)

        copies: list[jax.Array] = []
        for placement, blocks in self._groups:
            arrays, dims = self._arrays(state, blocks)
            copies += placement.shard_map_local(
                on_rank, (page, ("batch",)), *zip(arrays, dims, strict=True), out=self._kinds
            )
        tokens = self._placement.shard_map_local(
            lambda page, tokens: jax.lax.dynamic_index_in_dim(tokens, page[0], keepdims=True),
            (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS), out=_TOKENS,
        )  # fmt: skip
        return (*copies, tokens)

    def _write(self, state: EngineState, page: jax.Array, *parts: jax.Array) -> EngineState:
        """Write parts, as returned by _read, to page [r] of each rank. A page out of range is not written."""
        kinds = len(self._kinds)

        def on_rank(page, *rest):
            new, arrays = rest[:kinds], rest[kinds:]
            written, layer = [], 0
            for index, array in enumerate(arrays):
                which = index % self._width
                values = new[which // self._each][0, layer : layer + len(array), which % self._each]
                written.append(array.at[:, page[0]].set(values, mode="drop"))
                layer += len(array) if which == self._width - 1 else 0
            return tuple(written)

        leaves, structure = jax.tree.flatten(state.pages)
        for group, (placement, blocks) in enumerate(self._groups):
            arrays, dims = self._arrays(state, blocks)
            own = zip(parts[group * kinds : (group + 1) * kinds], self._kinds, strict=True)
            written = placement.shard_map_local(
                on_rank, (page, ("batch",)), *own, *zip(arrays, dims, strict=True), out=tuple(dims)
            )
            for block, at in zip(blocks, range(0, len(written), self._width), strict=True):
                leaves[block * self._width : (block + 1) * self._width] = written[at : at + self._width]
        tokens = self._placement.shard_map_local(
            lambda page, tokens, new: tokens.at[page[0]].set(new[0], mode="drop"),
            (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS), (parts[-1], _TOKENS), out=TOKEN_PAGE_DIMS,
        )  # fmt: skip
        return EngineState(state.tokens, jax.tree.unflatten(structure, leaves), tokens)

    # --- called by the engine ---

    def run(self, state: EngineState, rank: int, page_copy: PageCopy) -> EngineState:
        """Run one page copy and return the new state. A copy to the device donates `state`."""
        ranks = self._placement.num_shards("batch")
        pages = np.full(ranks, np.iinfo(np.int32).max, np.int32)
        pages[rank] = page_copy.page
        if page_copy.direction == "in":
            parts = [
                self._whole(index, shards)
                for index, shards in enumerate(self._host_pages.pop((rank, page_copy.host_page)))
            ]
            return self._write_fn(state, self._put(pages), *parts)
        pages[pages == np.iinfo(np.int32).max] = 0
        parts = self._read_fn(state, self._put(pages))
        self._shapes = [part.shape for part in parts]
        self._host_pages[rank, page_copy.host_page] = [_to_host(_shards_of(part, rank)) for part in parts]
        return state

    def _put(self, pages: np.ndarray) -> jax.Array:
        return jax.device_put(pages, self._placement.sharding("batch"))

    def _whole(self, index: int, shards: dict[Any, jax.Array]) -> jax.Array:
        """Build the array of all ranks from the shards of one rank, with zeros on all other devices."""
        sharding, shape = self._shardings[index], self._shapes[index]
        if self._zeros is None:
            self._zeros = [{} for _ in self._shardings]
        zeros, arrays = self._zeros[index], []
        for device in sharding.addressable_devices:
            if device in shards:
                arrays.append(jax.device_put(shards[device], SingleDeviceSharding(device)))
                continue
            if device not in zeros:
                some = next(iter(shards.values()))
                zeros[device] = jax.device_put(np.zeros(some.shape, some.dtype), device)
            arrays.append(zeros[device])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _shards_of(part: jax.Array, rank: int) -> dict[Any, jax.Array]:
    """Return the shards of one rank by device."""
    return {shard.device: shard.data for shard in part.addressable_shards if shard.index[0].start in (rank, None)}


def _to_host(shards: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    """Move shards to pinned host memory. Shards on a CPU stay where they are."""
    return {device: jax.device_put(data, sharding) if (sharding := _host_sharding(device)) else data
            for device, data in shards.items()}  # fmt: skip


def _host_sharding(device: Any) -> SingleDeviceSharding | None:
    if device.platform == "cpu" or _HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return SingleDeviceSharding(device, memory_kind=_HOST_MEMORY)

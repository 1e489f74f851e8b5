"""Transfer of KV pages: to host memory on eviction and back when a prompt matches them, or to a peer."""

# Dims: r ranks of the batch, L layers, K key/value head slots, S tokens of a page, H head dim.
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxmoe.cache.pages import PageCopy
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.engine.step_programs import EngineState
from jaxmoe.model.attend import PAGE_DIMS, TOKEN_PAGE_DIMS
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.quantization.formats import QMAX

# Dims of one page of every rank, for layers of one pipeline view: keys and values, their scales, and token ids.
_NUMBERS = ("batch", "layer", "unsharded", "kv_head", "page_token", "head_dim")
_SCALES = _NUMBERS[:-1]
_TOKENS = ("batch", "unsharded")
_HOST_MEMORY = "pinned_host"


class _TransferGroup(NamedTuple):
    """Blocks whose pages are read and written together: of one pipeline view, with caches of the same head dims.

    num_vectors: keys and values, or the latent alone. leaves: indices of each block's arrays in the flat KV pages.
    """

    placement: MeshPlacement
    num_vectors: int
    leaves: list[range]


class PageTransfer:
    """Read one page of every rank out of the KV cache, and write it back: here, or into the cache of a peer.

    A page is a tuple of arrays. For every group of layers: keys and values [r,L,V,K,S,H], with V vectors per token (2,
    or 1 for latent attention), and, if they are quantized, their scales [r,L,V,K,S]. The last array is the token ids
    [r,S]. All ranks take part in a transfer; a rank without a page reads any, and writes none.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._placement = runner.placement
        self._kinds = (_NUMBERS, _SCALES) if runner.kv_dtype in QMAX else (_NUMBERS,)
        self._groups = self._group(runner)
        self.shardings = [group.placement.sharding(*dims) for group in self._groups for dims in self._kinds]
        self.shardings.append(self._placement.sharding(*_TOKENS))
        self._read_fn = jax.jit(self._read)
        self._write_fn = jax.jit(self._write, donate_argnums=(0,))

    def _group(self, runner: ModelRunner) -> list[_TransferGroup]:
        groups: dict[tuple[Any, tuple[int, ...]], _TransferGroup] = {}
        start = 0
        for segment in runner.segments:
            placement = runner.placement.for_params(segment)
            for number in range(segment.period):
                head_dims = runner.config.cache_spec(segment.first + number).head_dims
                group = _TransferGroup(self._placement.with_view(placement.view), len(head_dims), [])
                own = groups.setdefault((placement.view, head_dims), group)
                own.leaves.append(range(start, start + len(head_dims) * len(self._kinds)))
                start = own.leaves[-1].stop
        return list(groups.values())

    # --- programs: one page of each rank ---

    def _arrays(self, leaves: list[jax.Array], group: _TransferGroup) -> tuple[list[jax.Array], list[tuple[str, ...]]]:
        """Return the page arrays of a group as a flat list, and their dims."""
        arrays = [leaves[index] for block in group.leaves for index in block]
        return arrays, [PAGE_DIMS[: array.ndim] for array in arrays]

    def _read(self, state: EngineState, page: jax.Array):
        """Read page [r] of each rank."""
        leaves, copies = jax.tree.leaves(state.pages), list[jax.Array]()
        for group in self._groups:
            arrays, dims = self._arrays(leaves, group)
            copies += group.placement.shard_map_local(
                partial(_read_group, num_vectors=group.num_vectors, width=len(group.leaves[0])),
                (page, ("batch",)), *zip(arrays, dims, strict=True), out=self._kinds,
            )  # fmt: skip
        tokens = self._placement.shard_map_local(
            lambda page, tokens: jax.lax.dynamic_index_in_dim(tokens, page[0], keepdims=True),
            (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS), out=_TOKENS,
        )  # fmt: skip
        return (*copies, tokens)

    def _write(self, state: EngineState, page: jax.Array, *parts: jax.Array) -> EngineState:
        """Write parts, as returned by _read, to page [r] of each rank. A page out of range is not written."""
        kinds = len(self._kinds)
        leaves, structure = jax.tree.flatten(state.pages)
        for index, group in enumerate(self._groups):
            arrays, dims = self._arrays(leaves, group)
            own = zip(parts[index * kinds : (index + 1) * kinds], self._kinds, strict=True)
            written = group.placement.shard_map_local(
                partial(_write_group, kinds=kinds, num_vectors=group.num_vectors, width=len(group.leaves[0])),
                (page, ("batch",)), *own, *zip(arrays, dims, strict=True), out=tuple(dims),
            )  # fmt: skip
            for leaf, array in zip((leaf for block in group.leaves for leaf in block), written, strict=True):
                leaves[leaf] = array
        tokens = self._placement.shard_map_local(
            lambda page, tokens, new: tokens.at[page[0]].set(new[0], mode="drop"),
            (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS), (parts[-1], _TOKENS), out=TOKEN_PAGE_DIMS,
        )  # fmt: skip
        return EngineState(state.tokens, jax.tree.unflatten(structure, leaves), tokens)

    # --- called by the engine ---

    def read(self, state: EngineState, rank: int, page: int) -> tuple[jax.Array, ...]:
        """Return one page of a rank, as entry `rank` of each array. Other entries hold any page."""
        return self._read_fn(state, self._pages(rank, page, others=0))

    def write(self, state: EngineState, rank: int, page: int, parts: Sequence[jax.Array]) -> EngineState:
        """Write entry `rank` of each array to a page of that rank, and return the new state. Donates `state`."""
        return self._write_fn(state, self._pages(rank, page, others=np.iinfo(np.int32).max), *parts)

    def _pages(self, rank: int, page: int, *, others: int) -> jax.Array:
        pages = np.full(self._placement.num_shards("batch"), others, np.int32)
        pages[rank] = page
        return self._placement.put(pages, "batch")


def _read_group(page: jax.Array, *arrays: jax.Array, num_vectors: int, width: int) -> tuple[jax.Array, ...]:
    taken = [jax.lax.dynamic_index_in_dim(array, page[0], axis=1, keepdims=False) for array in arrays]
    kinds = [jnp.concatenate(taken[which::width]) for which in range(width)]  # of all layers
    return tuple(jnp.stack(kinds[at : at + num_vectors], axis=1)[None] for at in range(0, width, num_vectors))


def _write_group(page: jax.Array, *rest: jax.Array, kinds: int, num_vectors: int, width: int) -> tuple[jax.Array, ...]:
    new, arrays = rest[:kinds], rest[kinds:]
    written, layer = [], 0
    for index, array in enumerate(arrays):
        which = index % width
        values = new[which // num_vectors][0, layer : layer + len(array), which % num_vectors]
        written.append(array.at[:, page[0]].set(values, mode="drop"))
        layer += len(array) if which == width - 1 else 0
    return tuple(written)


class HostOffload:
    """Copy pages to and from host memory. Copies are queued on the devices in call order, after earlier steps."""

    def __init__(self, runner: ModelRunner) -> None:
        self._transfer = PageTransfer(runner)
        self._host_pages: dict[tuple[int, int], list[dict[Any, jax.Array]]] = {}
        self._zeros: list[dict[Any, jax.Array]] | None = None
        self._shapes: list[jax.ShapeDtypeStruct] = []

    def clear(self) -> None:
        """Drop all host pages."""
        self._host_pages.clear()

    def __len__(self) -> int:
        return len(self._host_pages)

    def run(self, state: EngineState, rank: int, page_copy: PageCopy) -> EngineState:
        """Run one page copy and return the new state. A copy to the device donates `state`."""
        key = rank, page_copy.host_page
        if page_copy.direction == "in":
            parts = [self._whole(index, shards) for index, shards in enumerate(self._host_pages.pop(key))]
            return self._transfer.write(state, rank, page_copy.page, parts)
        read = self._transfer.read(state, rank, page_copy.page)
        self._shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in read]
        self._host_pages[key] = [_to_host(_shards_of(part, rank)) for part in read]
        return state

    def _whole(self, index: int, shards: dict[Any, jax.Array]) -> jax.Array:
        """Build the array of all ranks from the shards of one rank, with zeros on all other devices."""
        sharding, shape = self._transfer.shardings[index], self._shapes[index]
        if self._zeros is None:
            self._zeros = [{} for _ in self._transfer.shardings]
        zeros, arrays = self._zeros[index], []
        for device in sharding.addressable_devices:
            if device in shards:
                arrays.append(jax.device_put(shards[device], SingleDeviceSharding(device)))
                continue
            if device not in zeros:
                zeros[device] = jax.device_put(np.zeros(sharding.shard_shape(shape.shape), shape.dtype), device)
            arrays.append(zeros[device])
        return jax.make_array_from_single_device_arrays(shape.shape, sharding, arrays)


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

"""Pages of keys and values in host memory: copied out when devices need room, back when a prompt begins with them."""

# Dims: r ranks of the batch, L layers, K key/value head slots, S tokens of a page, H head dim.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxmoe.cache.pages import Move
from jaxmoe.engine.runner import EngineState, Runner
from jaxmoe.model.attend import PAGE_DIMS, TOKEN_PAGE_DIMS
from jaxmoe.ops.quantize import LARGEST

# One page of every rank: numbers of keys and values of all layers, their scales, and token ids.
_NUMBERS = ("batch", "one", "one", "kv_head", "page_token", "head_dim")
_SCALES = _NUMBERS[:-1]
_TOKENS = ("batch", "page_token")
_HOST_MEMORY = "pinned_host"


class HostTier:
    """The places of every rank. Copies are queued on the devices in the order of the calls, behind earlier steps."""

    def __init__(self, runner: Runner) -> None:
        self._place = runner.placement
        self._scaled = runner.kv_dtype in LARGEST
        self._dims = (_NUMBERS, *((_SCALES,) if self._scaled else ()), _TOKENS)
        self._kept: dict[tuple[int, int], list[dict[Any, jax.Array]]] = {}
        self._zeros: list[dict[Any, jax.Array]] | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._read_fn = jax.jit(self._read)
        self._write_fn = jax.jit(self._write, donate_argnums=(0,))

    def clear(self) -> None:
        """Nothing is kept any more."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    # --- programs: one page of each rank ---

    def _page_dims(self, state: EngineState) -> list[tuple[str, ...]]:
        return [PAGE_DIMS[: array.ndim] for array in jax.tree.leaves(state.pages)]

    def _read(self, state: EngineState, page: jax.Array):
        """page [r] -> numbers [r,L,2,K,S,H], scales [r,L,2,K,S] where there are any, token ids [r,S]."""
        width = 4 if self._scaled else 2

        def on_rank(page, tokens, *arrays):
            taken = [jax.lax.dynamic_index_in_dim(array, page[0], axis=1, keepdims=False) for array in arrays]
            kinds = [jnp.concatenate(taken[which::width]) for which in range(width)]  # of all layers
            parts = [jnp.stack(kinds[at : at + 2], axis=1)[None] for at in range(0, width, 2)]
            return (*parts, jax.lax.dynamic_index_in_dim(tokens, page[0], keepdims=True))

        return self._place.locally(
            on_rank, (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS),
            *zip(jax.tree.leaves(state.pages), self._page_dims(state), strict=True),
            out=self._dims,
        )  # fmt: skip

    def _write(self, state: EngineState, page: jax.Array, *parts: jax.Array) -> EngineState:
        """state with parts (as _read gives them) at page [r] of each rank; a page past the last changes nothing."""
        width, (arrays, structure) = 4 if self._scaled else 2, jax.tree.flatten(state.pages)

        def on_rank(page, tokens, new_tokens, *rest):
            new, arrays = rest[: len(parts) - 1], rest[len(parts) - 1 :]
            written, layer = [], 0
            for index, array in enumerate(arrays):
                which = index % width
                values = new[which // 2][0, layer : layer + len(array), which % 2]
                written.append(array.at[:, page[0]].set(values, mode="drop"))
                layer += len(array) if which == width - 1 else 0
            return (tokens.at[page[0]].set(new_tokens[0], mode="drop"), *written)

        dims = self._page_dims(state)
        tokens, *written = self._place.locally(
            on_rank, (page, ("batch",)), (state.token_pages, TOKEN_PAGE_DIMS), (parts[-1], _TOKENS),
            *zip(parts[:-1], self._dims[:-1], strict=True), *zip(arrays, dims, strict=True),
            out=(TOKEN_PAGE_DIMS, *dims),
        )  # fmt: skip
        return EngineState(state.tokens, jax.tree.unflatten(structure, written), tokens)

    # --- called by the engine ---

    def run(self, state: EngineState, rank: int, move: Move) -> EngineState:
        """The state after one move; state is donated where pages come in."""
        ranks = self._place.parts("batch")
        pages = np.full(ranks, np.iinfo(np.int32).max, np.int32)
        pages[rank] = move.page
        if move.way == "in":
            parts = [self._whole(index, shards) for index, shards in enumerate(self._kept.pop((rank, move.place)))]
            return self._write_fn(state, self._put(pages), *parts)
        pages[pages == np.iinfo(np.int32).max] = 0
        parts = self._read_fn(state, self._put(pages))
        self._shapes = [part.shape for part in parts]
        self._kept[rank, move.place] = [_to_host(_shards_of(part, rank)) for part in parts]
        return state

    def _put(self, pages: np.ndarray) -> jax.Array:
        return jax.device_put(pages, self._place.sharding("batch"))

    def _whole(self, index: int, shards: dict[Any, jax.Array]) -> jax.Array:
        """An array of every rank with one rank's shards at their devices, zeros elsewhere."""
        sharding, shape = self._place.sharding(*self._dims[index]), self._shapes[index]
        if self._zeros is None:
            self._zeros = [{} for _ in self._dims]
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
    """The shards of one rank, by device."""
    return {shard.device: shard.data for shard in part.addressable_shards if shard.index[0].start in (rank, None)}


def _to_host(shards: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    """The same in host memory: on a CPU they lie there already."""
    return {device: jax.device_put(data, sharding) if (sharding := _host_sharding(device)) else data
            for device, data in shards.items()}  # fmt: skip


def _host_sharding(device: Any) -> SingleDeviceSharding | None:
    if device.platform == "cpu" or _HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        return None
    return SingleDeviceSharding(device, memory_kind=_HOST_MEMORY)

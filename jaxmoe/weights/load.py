"""Loading .safetensors files into sharded arrays, with bounded host memory and each row read once."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.errors import CheckpointError, listed
from jaxmoe.families import FAMILIES, WeightSlice, may_stand_unused, weight_slices
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.quantization.tensors import LazyTensor
from jaxmoe.weights.dtypes import check_reach
from jaxmoe.weights.params import ParamInfo
from jaxmoe.weights.quantized_sources import ExpectedTensor, expected_tensors, quantized_sources
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.windows import Cut, WeightSliceIndex, Window, intersect

# Missing tensors are listed one by one up to this excess of tensors and numbers over those in the files.
_MAX_LISTED, _MAX_NUMBERS = 1000, 10_000_000
_STAGING_BYTES = 128 << 20
_FEW_COLUMNS = 0.75  # a share of a matrix's columns up to which rows are read in parts
_MIN_READ_BYTES = 512  # of a part of a row
_READ_BYTES = 32 << 20  # of one tensor, per read
_MAX_WORKERS = 8  # threads that read and convert tensors
_TILE_BYTES = 32
_ALIGNMENT = 64
_IN_REACH = "choose a dtype of larger range (dtype, --dtype), such as float32"


def check_keys(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, ExpectedTensor], config: ModelConfig, directory: Path
) -> None:
    """Raise CheckpointError if any tensors are missing, unused or misshapen, and list all of them.

    Otherwise raise CheckpointError for the first tensor of an unsupported dtype.
    """
    missing = sorted(set(expected) - set(tensors))
    names = FAMILIES[config.family].names
    unused = sorted(key for key in set(tensors) - set(expected) if not may_stand_unused(key, config, names))
    misshapen = [
        f"{key} {list(tensors[key].shape)} instead of {list(one.shapes[0])}"
        for key, one in sorted(expected.items())
        if key in tensors and tensors[key].shape not in one.shapes
    ]
    problems = []
    for name, keys in (("missing", missing), ("unused", unused), ("misshapen", misshapen)):
        if keys:
            problems.append(f"{len(keys)} {name}: {listed(keys, 20)}")
    if problems:
        raise CheckpointError(
            f"{directory} does not match its config.json (family {config.family}): {'; '.join(problems)}; "
            f"check that config.json and the weight files belong together"
        )
    for key, one in expected.items():
        tensors[key].check_dtype(one.dtypes, why=one.why)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Window:
    assert index is not None  # every device of the sharding is addressable here
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(index, shape, strict=True))


Source = tuple[str, int | None]  # the key of a tensor, and optionally an index into its first dim


def _fill(
    windows: Iterable[Window],
    parts: WeightSliceIndex,
    tensors: Mapping[str, LazyTensor],
    dtype: np.dtype,
    workers: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> dict[Window, np.ndarray]:
    """Return windows of a parameter as host arrays, reading each row of a tensor once.

    Elements without a weight slice are zero. on_bytes: called with the bytes filled by each read.
    """
    out = {window: _zeros_on_host([high - low for low, high in window], dtype) for window in windows}
    cuts: dict[Source, list[tuple[Cut, np.ndarray]]] = defaultdict(list)  # cuts of a tensor, and their destinations
    for window, array in out.items():
        for weight_slice, cut, place in parts.inside(window):
            cuts[weight_slice.key, weight_slice.lead].append(
                (cut, array[place].T if weight_slice.transpose else array[place])
            )
    opened = {(key, lead): tensors[key] if lead is None else tensors[key].at(lead) for key, lead in cuts}

    def reads() -> Iterator[tuple[Source, int, int]]:
        """Yield (tensor, first row, last row + 1) of each read, in file order."""
        for source in sorted(cuts, key=lambda source: (opened[source].path, opened[source].start)):
            tensor = opened[source]
            step = max(1, _READ_BYTES // max(1, tensor.num_bytes // max(1, tensor.shape[0])))
            for low, high in _runs(cut[0] for cut, _ in cuts[source]):
                yield from ((source, first, min(high, first + step)) for first in range(low, high, step))

    def read(source: Source, first: int, last: int) -> int:
        """Read some rows of a tensor into the windows; return the bytes filled."""
        low_column, rows = _read(opened[source], first, last, [cut for cut, _ in cuts[source]])
        num_bytes = 0
        check_reach(source[0], rows, dtype, _IN_REACH)
        for (span, *others), destination in cuts[source]:
            low, high = (-(-(max(at, span.start) - span.start) // span.step) for at in (first, min(last, span.stop)))
            if low < high:
                start = span.start + low * span.step - first
                taken = slice(start, start + (high - low - 1) * span.step + 1, span.step)
                to = destination[low:high]
                if low_column:
                    others = [slice(others[0].start - low_column, others[0].stop - low_column, others[0].step)]
                _copy(rows[(taken, *others)], to)
                num_bytes += to.nbytes
        return num_bytes

    for num_bytes in workers.map(lambda args: read(*args), reads()):
        on_bytes(num_bytes)
    return out


def _read(tensor: LazyTensor, first: int, last: int, cuts: Sequence[Cut]) -> tuple[int, np.ndarray]:
    """Read rows of a tensor, of a matrix only the columns that are needed if they are few. Return the first column too.

    A process whose devices hold some columns of a matrix reads these alone.
    """
    if isinstance(tensor, TensorInfo) and len(tensor.shape) == 2:
        low, high = min(cut[1].start for cut in cuts), max(cut[1].stop for cut in cuts)
        few = (high - low) <= _FEW_COLUMNS * tensor.shape[1]
        if few and (high - low) * tensor.dtype.itemsize >= _MIN_READ_BYTES:
            return low, tensor.read_columns(first, last, low, high)
    return 0, tensor.read_rows(first, last)


def _runs(spans: Iterable[slice]) -> list[tuple[int, int]]:
    """Merge overlapping or adjacent spans of rows into sorted runs."""
    runs: list[tuple[int, int]] = []
    for low, high in sorted((span.start, span.stop) for span in spans):
        if runs and low <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(high, runs[-1][1]))
        else:
            runs.append((low, high))
    return runs


def _copy(rows: np.ndarray, to: np.ndarray) -> None:
    """Copy rows into `to`. For a transposed `to`, copy a few rows at a time, which fills whole cache lines."""
    if rows.dtype == to.dtype:  # NumPy copies its own dtypes faster than ml_dtypes
        same_size = np.dtype(f"u{rows.itemsize}")
        rows, to = rows.view(same_size), to.view(same_size)
    step = len(rows) if to.flags.c_contiguous else max(1, _TILE_BYTES // to.itemsize)
    for first in range(0, len(rows), step):
        to[first : first + step] = rows[first : first + step]


def _zeros_on_host(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return zeros with the alignment that XLA requires to use them on a CPU device without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    room = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + num_bytes].view(dtype).reshape(shape)


def _cutting_order(parts: list[WeightSlice]) -> list[int]:
    """Return the dims to split a parameter along, such that no two blocks share a row of a tensor.

    First come the dims that select whole tensors (experts, gate and up) or runs of rows (heads), then the dim of the
    tensors' rows.
    """
    first = parts[0]
    slices = [dim for dim, at in enumerate(first.dst) if isinstance(at, slice)]
    num_runs = len(
        {
            (
                weight_slice.key,
                weight_slice.lead,
                weight_slice.cut[0].start,
                weight_slice.cut[0].stop,
                weight_slice.cut[0].step,
            )
            for weight_slice in parts
        }
    )
    dealt = [
        dim
        for dim in range(len(first.dst))
        if dim not in slices and len({weight_slice.dst[dim] for weight_slice in parts}) <= num_runs
    ]
    return [*dealt, slices[-1 if first.transpose else 0]]


def _blocks(window: Window, itemsize: int, order: list[int], shares: tuple[int, ...]) -> Iterator[Window]:
    """Split a window along the dims of `order` until each block is within the staging limit or no dim is left.

    shares: extent of one device's shard along each dim. Splits fall on shard bounds, which gives few different shapes.
    """
    num_bytes = math.prod(high - low for low, high in window) * itemsize
    if num_bytes <= _STAGING_BYTES or not order:
        yield window
        return
    dim, *rest = order
    low, high = window[dim]
    share = shares[dim]
    step = max(1, _STAGING_BYTES * (high - low) // num_bytes)
    # several whole shards, or equal parts of one shard
    step = step // share * share if step >= share else -(-share // -(-share // step))
    run = max(step, share)
    for start in range(low, high, run):
        for at in range(start, min(start + run, high), step):
            cut = (at, min(at + step, start + run, high))
            yield from _blocks((*window[:dim], cut, *window[dim + 1 :]), itemsize, rest, shares)


def load_param(
    info: ParamInfo,
    parts: list[WeightSlice],
    tensors: Mapping[str, LazyTensor],
    workers: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> jax.Array:
    """Load one parameter as a sharded array.

    on_bytes: called with the bytes of the parameter that each read filled; padding is not included. Host memory does
    not depend on the size of the parameter: it is twice the staging limit, plus _READ_BYTES (or one row of a tensor,
    if larger) for each worker. On CPU devices the staged arrays become the shards, and replicas share one array.
    """
    windows = {
        device: _bounds(index, info.shape)
        for device, index in info.sharding.addressable_devices_indices_map(info.shape).items()
    }
    shards: dict[jax.Device, jax.Array] = {}
    shares = info.sharding.shard_shape(info.shape)
    whole: Window = tuple((0, n) for n in info.shape)
    staged_whole = _staged_whole(windows)
    blocks = [whole] if staged_whole else _blocks(whole, info.dtype.itemsize, _cutting_order(parts), shares)
    placed = WeightSliceIndex(parts)
    for block in blocks:
        by_window: dict[Window, list[jax.Device]] = defaultdict(list)
        for device, window in windows.items():
            if (clipped := intersect(window, block)) is not None:
                by_window[clipped].append(device)
        for window, staged in _fill(by_window, placed, tensors, info.dtype, workers, on_bytes).items():
            for device in by_window[window]:
                part = jax.device_put(staged, device)
                if window == windows[device]:
                    shards[device] = part
                    continue
                if device not in shards:
                    shards[device] = _zeros(shares, info.dtype, device)
                start = [low - first for (low, _), (first, _) in zip(window, windows[device], strict=True)]
                shards[device] = _write_block(shards[device], part, start)
        jax.block_until_ready(list(shards.values()))  # free the staged blocks before the next ones
    return jax.make_array_from_single_device_arrays(info.shape, info.sharding, [shards[device] for device in windows])


def _staged_whole(devices: Iterable[jax.Device]) -> bool:
    """Return whether device memory is host memory, so that staging a whole parameter takes no extra memory."""
    return all(device.platform == "cpu" for device in devices)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device) -> jax.Array:
    with jax.default_device(device):
        return jnp.zeros(shape, dtype)


@partial(jax.jit, donate_argnums=0)
def _write_block(shard: jax.Array, block: jax.Array, start: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, block, start)


def assign_weight_slices(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    sizes: Sequence[ArraySizes],
    segments: tuple[LayerSegment, ...],
) -> dict[str, list[WeightSlice]]:
    """Return the weight slices of every parameter by its path, without regard to quantization.

    sizes: array sizes of the layers of each segment.
    Raises: CheckpointError if any key is missing, unused, misshapen or of another dtype.
    """
    _check_count(directory, tensors, config, sizes, segments)
    parts: dict[str, list[WeightSlice]] = defaultdict(list)
    for weight_slice in weight_slices(config, sizes, FAMILIES[config.family].names, segments):
        parts[weight_slice.path].append(weight_slice)
    kept = _kept_paths(config, segments)
    expected = expected_tensors(
        ((weight_slice, path in kept) for path in parts for weight_slice in parts[path]), tensors, config
    )
    check_keys(tensors, expected, config, directory)
    return parts


def _check_count(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    sizes: Sequence[ArraySizes],
    segments: tuple[LayerSegment, ...],
) -> None:
    """Raise CheckpointError if a config requires many more tensors or numbers than the files can have.

    This check comes before the weight slices are listed. It counts one layer of each kind, so that time and memory
    depend on the files and not on the config.
    """
    kinds, names = [config.kind(layer) for layer in range(config.num_hidden_layers)], FAMILIES[config.family].names

    def num_params(layers: Collection[int]) -> dict[str, int]:
        """Return the number of elements of each tensor in some layers and outside the layer stack."""
        needed = weight_slices(config, sizes, names, segments, layers=layers)
        return {weight_slice.key: math.prod(weight_slice.key_shape) for weight_slice in needed}

    outside, num_bytes = num_params(()), sum(tensor.num_bytes for tensor in tensors.values())
    num_tensors, num_numbers = len(outside), sum(outside.values())
    for kind, count in Counter(kinds).items():
        inside = num_params((kinds.index(kind),))
        num_tensors += count * (len(inside) - len(outside))
        num_numbers += count * (sum(inside.values()) - sum(outside.values()))
        # A byte has at most two numbers, of 4 bits.
        if num_tensors > len(tensors) + _MAX_LISTED or num_numbers > 2 * num_bytes + _MAX_NUMBERS:
            raise CheckpointError(
                f"{directory} does not match its config.json (family {config.family}): the config requires at least "
                f"{num_tensors} tensors with {num_numbers} numbers, the files have {len(tensors)} tensors of "
                f"{num_bytes} bytes; check that config.json and the weight files belong together"
            )


def _kept_paths(config: ModelConfig, segments: tuple[LayerSegment, ...]) -> set[str]:
    """Return the paths of the parameters that stay quantized on the devices."""
    if config.quantization is None:
        return set()
    return {
        f"segments/{number}/{block}/{path}"
        for number, part in enumerate(segments)
        for block in range(part.period)
        for path in config.quantization.of(part.first + block)
    }


def load_params(
    tensors: Mapping[str, TensorInfo],
    table: list[ParamInfo],
    parts: Mapping[str, list[WeightSlice]],
    config: ModelConfig,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[jax.Array]:
    """Load every parameter of the table as a sharded array, in table order.

    Parameters that checkpoints do not have are zero. parts: the weight slices from assign_weight_slices;
    quantized_sources.py derives the slices of quantized parameters from them. on_progress: called with (bytes filled,
    total bytes) after each read, by the calling thread.
    """
    sources, parts = quantized_sources(tensors, table, parts, config)
    in_checkpoint = {info.path for info in table if info.in_checkpoint}
    assert set(parts) == in_checkpoint, set(parts) ^ in_checkpoint
    total, done = sum(info.num_bytes for info in table), 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    on_progress(done, total)
    arrays = []
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as workers:
        for info in table:
            end = done + info.num_bytes
            arrays.append(load_param(info, parts.get(info.path, []), sources, workers, on_bytes))
            if done < end:  # padding, which no tensor fills
                on_bytes(end - done)
    assert done == total, (done, total)
    return arrays

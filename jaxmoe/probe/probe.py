"""Measure collectives, matmuls and memory bandwidth of the devices of this machine or cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxmoe.errors import MeshError
from jaxmoe.parallel.mesh import AXES, build_mesh, check_axes, fabric_index
from jaxmoe.planner.hardware import HardwareSpec, MeasuredOp, Platform, Points, Topology
from jaxmoe.probe import timed

GroupSpan = Literal["inside", "between", "both"]
_GIB = 1 << 30
_MIN_BYTES, _STEP = 512, 4
_BUFFERS = 6  # copies of one message that a program may hold
_WIDTHS = (256, 16384)  # matmul widths, doubled until one matmul takes _PRODUCT_SECONDS
_PRODUCT_SECONDS, _PRODUCT_ITERATIONS, _MEMORY_ITERATIONS = 0.01, 4, 8


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """Describe one measured collective along a mesh axis of `ranks` ranks. All groups of the mesh run at once.

    num_bytes: size of the whole message. us: median microseconds. span: whether the ranks of a group are inside one
    fast fabric, each on another fabric (between), or both.
    """

    op: MeasuredOp
    axis: str
    ranks: int
    span: GroupSpan
    num_bytes: int
    us: float

    @property
    def gbps(self) -> float:
        """Return the message rate in 10^9 bytes per second."""
        return self.num_bytes / self.us / 1e3


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Hold the rates of one device while all are active: 10^12 FLOP/s by dtype, and memory in 10^9 bytes per second."""

    tflops: Mapping[str, float]
    hbm_gbps: float


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Hold measured points and rates, and the HardwareSpec made of them.

    left_out: measurements that failed, with the reason. notes: how keys that are not measured were set.
    """

    hardware: HardwareSpec
    axes: Mapping[str, int]
    points: tuple[ProbePoint, ...]
    rates: DeviceRates
    left_out: tuple[str, ...]
    notes: Mapping[str, str]


def probe(
    *,
    axes: Mapping[str, int] | None = None,
    name: str | None = None,
    max_bytes: int = 64 << 20,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda text: None,
) -> ProbeResult:
    """Measure the devices of all processes, in groups of every size, or a mesh along its axes if `axes` is given.

    max_bytes: upper limit of message sizes, which grow from 512 bytes by factors of 4. repeats: measured runs of each
    program; their median is used. on_progress is called with a description of each measurement before it starts.
    Raises: MeshError for axes that do not fit, max_bytes out of range, or an unknown platform.
    """
    devices = jax.devices()
    platform, by_fabric = _platform(devices[0]), fabrics(devices)
    share = len(devices) // len(by_fabric)
    memory = min(_memory_bytes(one, share) for one in jax.local_devices())
    most = memory // _BUFFERS
    if not _MIN_BYTES <= max_bytes <= most:
        raise MeshError(
            f"largest message {max_bytes} bytes must lie in [{_MIN_BYTES}, {most}]: a program holds up to {_BUFFERS}"
            f" of them in {memory / _GIB:.1f} GiB of a device"
        )
    groups = list(_along(build_mesh(axes)) if axes else _groups(devices))
    points: list[ProbePoint] = []
    left_out: list[str] = []
    sizes = [_MIN_BYTES * _STEP**at for at in range(64) if _MIN_BYTES * _STEP**at <= max_bytes]
    plan = [(op, mesh, axis, size) for mesh, axis in groups for op in get_args(MeasuredOp) for size in sizes]
    for done, (op, mesh, axis, size) in enumerate(plan):
        on_progress(f"{op} of {size:,} bytes, {mesh.shape[axis]} ranks along {axis} ({done + 1} of {len(plan)})")
        point = _time(op, mesh, axis, size, repeats)
        if isinstance(point, str):
            left_out.append(point)
        else:
            points.append(point)
    rates = _rates(max_bytes, memory, repeats, on_progress, left_out)
    hardware, notes = _hardware(platform, share, points, rates, memory, name)
    shown = check_axes(axes or {"tensor": len(devices)})
    return ProbeResult(
        hardware=hardware, axes={axis: size for axis, size in shown.items() if size > 1} or {"tensor": 1},
        points=tuple(points), rates=rates, left_out=tuple(left_out), notes=notes,
    )  # fmt: skip


def fabrics(devices: Sequence[jax.Device]) -> dict[int, list[jax.Device]]:
    """Group devices by their fast fabric: the TPU slice or GPU node that JAX reports as slice_index, else the process.

    Raises: MeshError if fabrics have different numbers of devices.
    """
    by_fabric: dict[int, list[jax.Device]] = {}
    for device in sorted(devices, key=lambda one: one.id):
        by_fabric.setdefault(fabric_index(device), []).append(device)
    if len({len(members) for members in by_fabric.values()}) > 1:
        counts = ", ".join(str(len(members)) for members in by_fabric.values())
        raise MeshError(f"nodes have {counts} devices: all must have the same number")
    return by_fabric


def _groups(devices: Sequence[jax.Device]) -> Iterator[tuple[Mesh, str]]:
    """Yield meshes and the axis to measure: groups of 2, 4, 8... ranks on one fabric, then on different fabrics."""
    by_fabric = fabrics(devices)
    count, share = len(by_fabric), len(devices) // len(by_fabric)
    for ranks in _sizes(share):
        axes = {"data": len(devices) // ranks, "tensor": ranks}
        if count == 1:
            yield build_mesh(axes, devices), "tensor"
        else:
            yield _mesh(np.array(list(by_fabric.values()), object).reshape(-1, 1, 1, ranks)), "tensor"
    for ranks in _sizes(count):
        apart = np.array(list(by_fabric.values()), object).reshape(-1, ranks, 1, share)
        yield _mesh(apart.swapaxes(0, 1)), "data"


def _sizes(limit: int) -> list[int]:
    """Return the powers of two from 2 that divide limit, and limit itself."""
    powers = [1 << at for at in range(1, limit.bit_length()) if limit % (1 << at) == 0]
    return sorted({*powers, limit} - {1})


def _along(mesh: Mesh) -> Iterator[tuple[Mesh, str]]:
    return ((mesh, axis) for axis in reversed(AXES) if mesh.shape[axis] > 1)


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _group_span(mesh: Mesh, axis: str) -> GroupSpan:
    groups = np.moveaxis(np.vectorize(fabric_index, otypes=[int])(mesh.devices), AXES.index(axis), -1)
    apart = {len(set(group)) for group in groups.reshape(-1, mesh.shape[axis]).tolist()}
    return "inside" if apart == {1} else "between" if apart == {mesh.shape[axis]} else "both"


def _time(op: MeasuredOp, mesh: Mesh, axis: str, size: int, repeats: int) -> ProbePoint | str:
    """Time one collective, or return the reason why it cannot be measured."""
    ranks = mesh.shape[axis]
    size = timed.message_bytes(size, ranks, mesh)
    iterations, label = timed.num_iterations(size), f"{op} of {size:,} bytes over {ranks} ranks"
    try:
        program, argument = timed.collective_program(op, axis, size, mesh, iterations)
        if held := timed.differing(program, timed.expected(op, axis, size, ranks), iterations, mesh):
            return f"{label}: the compiler emits {held} instead of {iterations}"
        seconds = timed.median_seconds(program, argument, repeats)
    except RuntimeError as error:  # XLA: not implemented on this platform, or out of memory
        return f"{label}: {_first_line(error)}"
    return ProbePoint(
        op=op,
        axis=axis,
        ranks=ranks,
        span=_group_span(mesh, axis),
        num_bytes=size,
        us=_short(seconds / iterations * 1e6),
    )


def _rates(
    max_bytes: int, memory: int, repeats: int, on_progress: Callable[[str], None], left_out: list[str]
) -> DeviceRates:
    """Measure matmul and memory rates with all devices of this process active."""
    mesh = build_mesh({"data": jax.local_device_count()}, jax.local_devices())
    tflops: dict[str, float] = {}
    for dtype in timed.DTYPES:
        width = _WIDTHS[0]
        while width <= _WIDTHS[1]:
            on_progress(f"{dtype} matmuls of {width} x {width} matrices")
            try:
                program, argument = timed.product_program(dtype, width, mesh, _PRODUCT_ITERATIONS)
                seconds = timed.median_seconds(program, argument, repeats) / _PRODUCT_ITERATIONS
            except RuntimeError as error:  # XLA: not implemented on this platform, or out of memory
                left_out.append(f"{dtype} matmuls of width {width}: {_first_line(error)}")
                break
            tflops[dtype] = max(tflops.get(dtype, 0.0), _short(2 * width**3 / seconds / 1e12))
            width = width * 2 if seconds < _PRODUCT_SECONDS else _WIDTHS[1] + 1
    if "bf16" not in tflops:
        raise MeshError(f"the {mesh.devices.flat[0].device_kind} computes no bf16 matmuls: {left_out[-1]}")
    on_progress("memory")
    least = 16 << 20 if mesh.devices.flat[0].platform == "cpu" else _GIB  # larger than caches
    num_bytes = min(max(max_bytes, least), memory // _BUFFERS) // 512 * 512
    seconds = timed.median_seconds(*timed.memory_program(num_bytes, mesh, _MEMORY_ITERATIONS), repeats)
    return DeviceRates(tflops=tflops, hbm_gbps=_short(2 * num_bytes * _MEMORY_ITERATIONS / seconds / 1e9))


def _hardware(
    platform: Platform, share: int, points: Sequence[ProbePoint], rates: DeviceRates, memory: int, name: str | None
) -> tuple[HardwareSpec, dict[str, str]]:
    """Return the measured HardwareSpec, and notes on keys that were not measured. share: devices per fabric."""
    devices = jax.devices()
    per_node = min(share, jax.local_device_count()) if platform == "tpu" else share
    notes = {"hbm_gb": "not measured: memory that a program may use"}
    inside, between = _link(points, "inside"), _link(points, "between")
    if inside is None:
        notes["scale_up_gbps"] = "not measured: set to the memory bandwidth"
    if between is None:
        notes["scale_out_gbps"] = "not measured: set to the rate inside a node"
    shapes: dict[str, Topology] = {"tpu": "torus", "rocm": "peers"}
    facts: dict[str, Any] = {"torus_dims": _torus_dims(devices)} if platform == "tpu" else {}
    facts |= {"latency_us": inside[1]} if inside else {}
    facts |= {"scale_out_latency_us": between[1]} if between else {}
    up = inside[0] if inside else rates.hbm_gbps
    bf16 = rates.tflops["bf16"]
    hardware = HardwareSpec(
        device=name or re.sub(r"[^a-z0-9.]+", "-", devices[0].device_kind.lower()).strip("-"),
        platform=platform, devices_per_node=per_node, scale_up_devices=share, nodes=len(devices) // per_node,
        hbm_gb=_short(memory / 1e9), hbm_gib=_short(memory / _GIB), hbm_gbps=rates.hbm_gbps,
        scale_up=shapes.get(platform, "switch"), scale_up_gbps=up, scale_out_gbps=between[0] if between else up,
        # A quantized dtype that is no faster than bf16 has no hardware matmul.
        tflops={key: rate for key, rate in rates.tflops.items() if key in ("bf16", "f32") or rate > bf16},
        attained={"hbm": 1, "compute": 1, "link": 1},
        collectives=_tables(points, "inside"), collectives_between_nodes=_tables(points, "between"), **facts,
    )  # fmt: skip
    return hardware, notes


def _platform(device: jax.Device) -> Platform:
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if platform not in get_args(Platform):
        raise MeshError(f"platform {platform!r} must be one of {', '.join(get_args(Platform))}")
    return platform


def _torus_dims(devices: Sequence[Any]) -> int:
    return max(1, sum(len(set(along)) > 1 for along in zip(*(one.coords for one in devices), strict=True)))


def _memory_bytes(device: jax.Device, share: int) -> int:
    """Return the bytes that a program may use of one device. `share` emulated devices split the host's memory."""
    try:
        stats = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):
        stats = {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // share


def _link(points: Sequence[ProbePoint], span: GroupSpan) -> tuple[float, float] | None:
    """Return link rate (10^9 bytes per second) and latency (microseconds), measured in the widest groups.

    The rate is that at which one device sends in the largest permute or all-gather, whichever is faster. The latency is
    the time of the smallest permute. Return None if nothing was measured in this span.
    """
    matching = [one for one in points if one.span == span and one.op in ("collective-permute", "all-gather")]
    widest = max((one.ranks for one in matching), default=0)
    matching = [one for one in matching if one.ranks == widest]
    if not matching:
        return None
    largest = max(one.num_bytes for one in matching)
    share = {"collective-permute": 1.0, "all-gather": (widest - 1) / widest}
    rate = max(one.gbps * share[one.op] for one in matching if one.num_bytes == largest)
    smallest = min(matching, key=lambda one: (one.op != "collective-permute", one.num_bytes))
    return _short(rate), smallest.us


def _tables(points: Sequence[ProbePoint], span: GroupSpan) -> dict[str, dict[int, Points]]:
    """Return measured times as tables of a hardware file. For axes of equal size, the slower time is used."""
    tables: dict[str, dict[int, dict[float, float]]] = {}
    for one in sorted((one for one in points if one.span == span), key=lambda one: (one.ranks, one.num_bytes)):
        times = tables.setdefault(one.op, {}).setdefault(one.ranks, {})
        times[one.num_bytes] = max(times.get(one.num_bytes, 0.0), one.us)
    return {op: {ranks: tuple(times.items()) for ranks, times in by.items()} for op, by in tables.items()}


def _short(value: float) -> float:
    """Round to four significant digits, as the file has them."""
    return float(f"{value:.4g}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]

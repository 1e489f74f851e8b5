"""Named device mesh with the axes data, pipeline, expert, tensor (outermost to innermost), from text or a preset.

Tensor is innermost because its all-reduces are the most frequent, and neighbors share the fastest links. Devices of
several processes fill the mesh process by process, so tensor groups leave a process last and data groups first.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxmoe.assets import asset_dir
from jaxmoe.errors import MeshError

AXES = ("data", "pipeline", "expert", "tensor")

_log = logging.getLogger("jaxmoe")
_HOST_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def preset_names() -> list[str]:
    """Return the names of the mesh presets in meshes/, sorted."""
    return sorted(path.stem for path in asset_dir("meshes").glob("*.toml"))


def parse_mesh(mesh: str | Mapping[str, int] | Mesh) -> dict[str, int]:
    """Return the sizes of all four axes of a mesh. Missing axes have size 1.

    mesh: text such as "data=2,tensor=4", the name of a preset, a mapping of axis sizes, or a jax Mesh.
    Raises: MeshError if an axis or preset is unknown, an axis is named twice, or a size is not a whole number >= 1.
    """
    if isinstance(mesh, Mesh | Mapping):
        return check_axes(mesh.shape if isinstance(mesh, Mesh) else mesh)
    if not isinstance(mesh, str):
        raise MeshError(f"mesh={mesh!r} must be text such as data=2,tensor=4, a mapping of axis sizes, or a jax Mesh")
    text = mesh
    if "=" not in text:
        return _read_preset(text.strip())
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, value = (piece.strip() for piece in part.partition("="))
        if axis in sizes:
            raise MeshError(f"mesh {text!r} names axis {axis!r} twice: name each once")
        if not value.isascii() or not value.isdigit():
            raise MeshError(f"mesh {text!r}: {part.strip()!r} must read axis=size, as in data=2,tensor=4")
        sizes[axis] = int(value)
    return check_axes(sizes)


def check_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of all four axes in mesh order. Missing axes have size 1.

    Raises: MeshError with the axis, its size and the limit.
    """
    for axis, size in sizes.items():
        if axis not in AXES:
            raise MeshError(f"unknown mesh axis {axis!r}; the axes are data, tensor, pipeline, expert")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise MeshError(f"mesh axis {axis}={size!r} must be a whole number of at least 1")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def _read_preset(name: str) -> dict[str, int]:
    path = asset_dir("meshes") / f"{name}.toml"
    if name not in preset_names():
        raise MeshError(
            f"mesh {name!r} is neither axes (data=2,tensor=4) nor a preset; presets: {', '.join(preset_names())}"
        )
    return check_axes(tomllib.loads(path.read_text(encoding="utf-8"))["axes"])


def default_axes(num_devices: int, *, num_experts: int) -> dict[str, int]:
    """Return the axes used if the user names none.

    With at least as many experts as devices, the expert axis takes all devices. Otherwise the tensor axis does.
    """
    axis = "expert" if num_experts >= num_devices else "tensor"
    return check_axes({axis: num_devices})


def emulate_devices(num_devices: int) -> None:
    """Make the CPU appear as num_devices devices. Call it before JAX starts a backend.

    Raises: MeshError if the count is out of range, XLA_FLAGS requests another count, or a backend has started.
    """
    if not 1 <= num_devices <= 512:
        raise MeshError(f"devices={num_devices} must lie in [1, 512]")
    if (flag := _HOST_COUNT_FLAG.search(os.environ.get("XLA_FLAGS", ""))) and int(flag[1]) != num_devices:
        raise MeshError(
            f"devices={num_devices} but XLA_FLAGS already sets {flag[1]} host devices: make them equal or drop one"
        )
    try:
        jax.config.update("jax_platforms", "cpu")
        if not flag:
            jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:
        raise MeshError(f"devices={num_devices} must be set before JAX starts its devices: {error}") from error
    if jax.device_count() != num_devices:
        raise MeshError(
            f"devices={num_devices} set after JAX started with {jax.device_count()} devices: set it before JAX starts"
        )


def build_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a Mesh with all four axes, with devices in the order of `arranged`.

    devices: devices to choose from; by default all devices of all processes. If the axes need fewer, the mesh takes
    nearest_devices and process 0 logs a warning.
    Raises: MeshError if the axes need more devices than exist, or leave a process without devices; as `arranged`.
    """
    axes = check_axes(axes)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(axes.values())
    shown = " x ".join(f"{axis}={size}" for axis, size in axes.items())
    if wanted > len(devices):
        raise MeshError(f"mesh {shown} needs {wanted} devices and {_counted(devices, wanted)}")
    if wanted < len(devices):
        devices = _some_devices(devices, wanted, shown)
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(arranged(devices, tuple(axes.values())), AXES, axis_types=types)


def arranged(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Return the devices in the shape of a mesh, with near devices along its last axis.

    TPUs are arranged by the topology of their slice. Other devices fill the shape in process order.
    Raises: MeshError if the devices are of several TPU slices.
    """
    if devices[0].platform != "tpu":
        ordered = np.empty(len(devices), object)
        ordered[:] = in_process_order(devices)
        return ordered.reshape(shape)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        raise MeshError(f"the {len(devices)} devices are of {len(slices)} TPU slices: a mesh has devices of one slice")
    try:
        placed = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices).devices
    except NotImplementedError:  # no torus axis has this length: split physical axes, with longer paths
        placed = create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return in_rings(placed)


def in_process_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Return devices in the order of their fabrics, then of their processes, then of their ids."""
    return sorted(devices, key=lambda device: (fabric_index(device), device.process_index, device.id))


def fabric_index(device: jax.Device) -> int:
    """Return the TPU slice, GPU node or NVLink domain of a device that JAX reports as slice_index, else the process."""
    reported = getattr(device, "slice_index", None)
    return device.process_index if reported is None else reported


def hosts_of(mesh: Mesh) -> np.ndarray:
    """Return an index of the host of every device, in the shape of the mesh.

    Devices with the same index reach each other without a network. Each process counts as a host, except that GPUs and
    TPUs of several processes count as one host if JAX reports that they share a node, a fabric or a slice.
    """
    return np.array(
        [device.process_index if device.platform == "cpu" else fabric_index(device) for device in mesh.devices.flat]
    ).reshape(mesh.devices.shape)


def check_processes(mesh: Mesh) -> Mesh:
    """Return a user's mesh if every process has devices of it. Raises: MeshError."""
    idle = {device.process_index for device in jax.devices()} - {one.process_index for one in mesh.devices.flat}
    if idle:
        raise MeshError(
            f"the Mesh of {mesh.size} devices leaves process {min(idle)} without any: use devices of all processes, or "
            f"start fewer"
        )
    return mesh


def _counted(devices: Sequence[jax.Device], wanted: int) -> str:
    """Return how many devices there are, and how to emulate as many as are wanted."""
    processes = len({device.process_index for device in devices})
    held = f"there are {len(devices)}" if processes == 1 else f"{processes} processes have {len(devices)}"
    if devices[0].platform != "cpu":
        return held
    each = "" if processes == 1 else " in each process"
    return f"{held}; on CPU emulate them with --devices {-(-wanted // processes)}{each}"


def conform_mesh(mesh: Mesh) -> Mesh:
    """Return a user's Mesh with all four axes in the order of AXES. Every device keeps its coordinates along each axis.

    Missing axes are added with size 1, and every axis type becomes Auto.
    Raises: MeshError if the mesh has no devices, or an axis of another name.
    """
    if mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    if mesh.devices.size == 0 or mesh.devices.flat[0] is None:
        raise MeshError("the Mesh has no devices: create it from jax.devices()")
    axes = check_axes(dict(mesh.shape))
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    devices = mesh.devices.transpose(order).reshape(tuple(axes.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def nearest_devices(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """Return `count` devices that are close to each other.

    These are the first devices in process order. In a TPU slice they are the first full box of `count` devices with the
    shortest path between its corners, if there is such a box.
    """
    if devices[0].platform != "tpu":
        return in_process_order(devices)[:count]
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    for members in slices.values():
        if len(members) >= count and all(hasattr(device, "coords") for device in members):
            box = _first_box(members, count)
            if box is not None:
                return box
    return list(devices[:count])


def _first_box(devices: Sequence[Any], count: int) -> list[Any] | None:
    """Return the devices of the first full box of `count` in one slice, in their original order, if there is one."""
    places = {(*device.coords, getattr(device, "core_on_chip", 0)): device for device in devices}
    low, high = ([edge(axis) for axis in zip(*places, strict=True)] for edge in (min, max))
    extents = [last - first + 1 for first, last in zip(low, high, strict=True)]
    for shape in sorted(_boxes(count, extents), key=lambda shape: (sum(shape[:-1]), shape)):
        starts = (
            range(first, first + extent - size + 1) for first, extent, size in zip(low, extents, shape, strict=True)
        )
        for start in product(*starts):
            inside = set(product(*(range(at, at + size) for at, size in zip(start, shape, strict=True))))
            if inside <= places.keys():
                return [device for place, device in places.items() if place in inside]
    return None


def _boxes(count: int, extents: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all ways to write count as a product of one factor per extent, each at most its extent."""
    if not extents:
        return [()] if count == 1 else []
    sizes = [size for size in range(1, min(count, extents[0]) + 1) if count % size == 0]
    return [(size, *rest) for size in sizes for rest in _boxes(count // size, extents[1:])]


def _some_devices(devices: Sequence[jax.Device], count: int, mesh: str) -> list[jax.Device]:
    """Return nearest_devices, and log a warning with their ids in process 0.

    Raises: MeshError if a process would have no device.
    """
    chosen = nearest_devices(devices, count)
    idle = {device.process_index for device in devices} - {device.process_index for device in chosen}
    if idle:
        raise MeshError(
            f"mesh {mesh} takes {count} of {len(devices)} devices and leaves process {min(idle)} without any: use "
            f"larger axes, or start fewer processes"
        )
    ids = ", ".join(str(device.id) for device in chosen[:8]) + (", ..." if count > 8 else "")
    if jax.process_index() == 0:
        platform = chosen[0].platform
        _log.warning("jaxmoe: mesh %s takes %d of %d %s devices (%s)", mesh, count, len(devices), platform, ids)
    return chosen


def in_rings(devices: np.ndarray) -> np.ndarray:
    """Return the devices [...] of a mesh, reordered so that axes of four devices on a square follow its edges.

    XLA:TPU reduce-scatters without padding along a ring. In row and column order it pads.
    """
    if not hasattr(devices.flat[0], "coords"):
        return devices
    for axis in [at for at, size in enumerate(devices.shape) if size == 4]:
        around = devices.take([0, 1, 3, 2], axis)
        if not _is_ring(devices, axis) and _is_ring(around, axis):
            devices = around
    return devices


def _is_ring(devices: np.ndarray, axis: int) -> bool:
    """Return whether each device along an axis has a link to the next one, and the last to the first."""
    coords = np.array([device.coords for device in devices.flat]).reshape(*devices.shape, -1)
    return bool((abs(coords - np.roll(coords, 1, axis)).sum(-1) <= 1).all())


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return the compiler options for programs that read weights on a mesh's devices. Most devices need none.

    On TPU7x, 16-bit matrices keep the tiles of the program's arguments. By default the compiler copies all weights to
    taller tiles at every step (docs/clusters.md).
    """
    if mesh.devices.flat[0].device_kind != "TPU7x":
        return None
    return {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}


def device_platform(backend: str) -> str:
    """Return the platform of a JAX backend's devices: "gpu" for "cuda" and "rocm", otherwise the backend's name."""
    return "gpu" if backend in ("cuda", "rocm") else backend


@dataclass(frozen=True)
class PlannedDevice:
    """Represent a device that need not exist. It is only planned with, never compiled for.

    platform: "cpu", "gpu" or "tpu".
    """

    platform: str
    device_kind: str = "planned"


@dataclass(frozen=True)
class PlannedMesh:
    """Represent a mesh of devices that need not exist, so that a MeshPlacement can compute shardings.

    No array can be placed on it and no program compiled for it. Raises: MeshError as check_axes does.
    """

    axes: Mapping[str, int]
    platform: str = "gpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", check_axes(self.axes))

    @property
    def shape(self) -> Mapping[str, int]:
        """Return the sizes of all four axes in mesh order."""
        return self.axes

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Return the names of all four axes."""
        return AXES

    @property
    def size(self) -> int:
        """Return the number of devices."""
        return math.prod(self.axes.values())

    @cached_property
    def devices(self) -> Any:
        """Return an array of planned devices in the shape of the axes."""
        return np.full(tuple(self.axes.values()), PlannedDevice(self.platform))

    @cached_property
    def abstract_mesh(self) -> AbstractMesh:
        """Return the mesh as a jax.sharding.AbstractMesh."""
        return AbstractMesh(tuple(self.axes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
    """Return a short description of the mesh, such as "data=2 x tensor=2 x expert=2 on 8 cpu devices"."""
    named = [f"{axis}={mesh.shape[axis]}" for axis in ("data", "tensor", "pipeline", "expert") if mesh.shape[axis] > 1]
    platform = mesh.devices.flat[0].platform
    plural = "s" if mesh.size > 1 else ""
    return f"{' x '.join(named) or 'one device'} on {mesh.size} {platform} device{plural}"

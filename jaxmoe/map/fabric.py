"""Fabric that connects the devices of the map: nodes, fast fabrics (domains), and the network between them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from jaxmoe.parallel.mesh import device_platform
from jaxmoe.planner.hardware import HardwareSpec


@dataclass(frozen=True, kw_only=True)
class DeviceFabric:
    """Describe the links between devices, which are numbered in the order of the mesh.

    node, domain: devices per host and per fast fabric. kind: "switch", "torus" or "peers" (a link between each pair of
    a domain). shape, wraps: torus shape of a domain, and which of its dims are rings. last_shape, last_wraps: the same
    of the last domain, which may have fewer devices. given: whether hardware was named. hbm_bytes, *_gbps: of one
    device, None if not.
    """

    name: str
    given: bool
    platform: str
    node: int
    domain: int
    kind: str
    shape: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()
    last_shape: tuple[int, ...] = ()
    last_wraps: tuple[bool, ...] = ()
    hbm_bytes: float | None = None
    scale_up_gbps: float | None = None
    scale_out_gbps: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the dict that the page reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def fabric_of(hardware: HardwareSpec | None, num_devices: int, *, shape: tuple[int, ...] = ()) -> DeviceFabric:
    """Return the fabric of num_devices devices. shape: of the torus, if known.

    Without hardware it is one node with a switch.
    """
    if hardware is None:
        return DeviceFabric(
            name="one switch", given=False, platform="gpu", node=num_devices, domain=num_devices, kind="switch"
        )
    domain = min(num_devices, hardware.scale_up_devices)
    torus = hardware.scale_up == "torus"
    shape = (shape or torus_shape(domain, hardware.torus_dims)) if torus else ()
    rest = num_devices % domain
    last = torus_shape(rest, hardware.torus_dims) if torus and rest else shape
    return DeviceFabric(
        name=hardware.device, given=True, platform=device_platform(hardware.platform),
        node=min(num_devices, hardware.devices_per_node), domain=domain, kind=hardware.scale_up, shape=shape,
        wraps=tuple(_wraps(size, len(shape)) for size in shape), last_shape=last,
        last_wraps=tuple(_wraps(size, len(last)) for size in last), hbm_bytes=hardware.hbm_bytes,
        scale_up_gbps=hardware.scale_up_gbps, scale_out_gbps=hardware.scale_out_gbps,
    )  # fmt: skip


def torus_shape(num_devices: int, dims: int) -> tuple[int, ...]:
    """Return the torus shape with the given number of dims whose sizes differ least, in ascending order."""
    factors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    shapes = (
        (*sizes, num_devices // math.prod(sizes))
        for sizes in product(factors, repeat=dims - 1)
        if num_devices % math.prod(sizes) == 0
    )
    return min((tuple(sorted(shape)) for shape in shapes), key=sum)


def _wraps(size: int, dims: int) -> bool:
    """Return whether a torus dim is a ring: a multiple of 4 (cubes) in 3D slices, of 16 (a pod's side) in 2D.

    Source: jax-ml/scaling-book (tpus.md).
    """
    return size % 4 == 0 if dims > 2 else size % 16 == 0

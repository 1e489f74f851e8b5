"""How devices are joined, as the map draws them: nodes, fast fabrics, the way between them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from jaxmoe.parallel.mesh import device_platform
from jaxmoe.planner.hardware import HardwareSpec


@dataclass(frozen=True, kw_only=True)
class DeviceFabric:
    """Devices in the order of the mesh: node devices on each host, domain devices on each fast fabric.

    kind: "switch", "torus" or "peers" (each pair of a domain has a link). shape, wraps: of a domain's torus, and which
    of its dims are closed to rings; last_shape, last_wraps: of the last domain's, which may have fewer devices.
    hbm_bytes, *_gbps: of one device, None where no hardware was named. given: whether it was.
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
        """As the page reads it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def fabric_of(hardware: HardwareSpec | None, num_devices: int, *, shape: tuple[int, ...] = ()) -> DeviceFabric:
    """So many devices of a kind; of none, one node whose devices share a switch. shape: of the torus, where known."""
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
    """The sizes of a torus of so many dims that are nearest each other, ascending."""
    factors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    shapes = (
        (*sizes, num_devices // math.prod(sizes))
        for sizes in product(factors, repeat=dims - 1)
        if num_devices % math.prod(sizes) == 0
    )
    return min((tuple(sorted(shape)) for shape in shapes), key=sum)


def _wraps(size: int, dims: int) -> bool:
    """Slices of three dims are closed where whole cubes of 4 lie behind each other, of two where a pod's side is whole.
    Source: jax-ml/scaling-book (tpus.md)."""
    return size % 4 == 0 if dims > 2 else size % 16 == 0

"""Target clusters of ahead-of-time compilation: names, sizes and memory of devices that need not be present."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmoe.errors import ConfigError

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TargetDevice:
    """Describe a kind of device.

    hbm_bytes: memory of one device of the mesh. devices_per_chip: JAX devices per chip. options: topology options that
    give this number of devices.
    """

    platform: Literal["tpu", "cuda"]
    hbm_bytes: int
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()


# Memory: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); of GPUs, usable memory (gpus/*.txtpb).
DEVICES: dict[str, TargetDevice] = {
    # megacore: both cores are one device, as JAX shows real v4 chips
    "v4": TargetDevice(platform="tpu", hbm_bytes=32 * _GIB, options=(("chip_config_name", "megacore"),)),
    "v5e": TargetDevice(platform="tpu", hbm_bytes=16 * _GIB),
    "v5p": TargetDevice(platform="tpu", hbm_bytes=95 * _GIB),
    "v6e": TargetDevice(platform="tpu", hbm_bytes=32 * _GIB),
    "tpu7x": TargetDevice(platform="tpu", hbm_bytes=96 * _GIB, devices_per_chip=2),
    "h100": TargetDevice(platform="cuda", hbm_bytes=84942979072),
    "h200": TargetDevice(platform="cuda", hbm_bytes=151397597184),
    "b200": TargetDevice(platform="cuda", hbm_bytes=191514411008),
}
_FLAT = ("v5e", "v6e")  # TPUs with two-dimensional slices
_MAX_DEVICES = 1 << 16
_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)*")


@dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """Describe a cluster. shape: chips along each dim of a TPU slice, or (nodes, GPUs per node)."""

    name: str
    shape: tuple[int, ...]

    @property
    def device(self) -> TargetDevice:
        """Return the kind of its devices."""
        return DEVICES[self.name]

    @property
    def num_devices(self) -> int:
        """Return the number of devices of a mesh over the whole cluster."""
        return math.prod(self.shape) * self.device.devices_per_chip

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse_target(text: str) -> CompileTarget:
    """Parse a target, as in "v5p:4x4x8" or "h200:2x8". Raises: ConfigError naming the value and the valid form."""
    name, _, shape = text.partition(":")
    if name not in DEVICES:
        raise ConfigError(f"target {text!r}: unknown device {name!r}; known devices are {', '.join(DEVICES)}")
    example = "2x8" if DEVICES[name].platform == "cuda" else "4x4" if name in _FLAT else "4x4x4"
    dims = len(example.split("x"))
    if not _SHAPE.fullmatch(shape) or len(sizes := tuple(map(int, shape.split("x")))) != dims:
        raise ConfigError(f"target {text!r}: {name} needs {dims} sizes, as in {name}:{example}")
    target = CompileTarget(name=name, shape=sizes)
    if target.num_devices > _MAX_DEVICES:
        raise ConfigError(f"target {text!r} has {target.num_devices} devices; at most {_MAX_DEVICES} are supported")
    return target


def environment(target: CompileTarget) -> Mapping[str, str]:
    """Return variables to set before JAX is imported, so that the target's compiler works without its devices."""
    common = {"JAX_PLATFORMS": "cpu"}
    if target.device.platform == "tpu":
        # The compiler uses no device, so several processes may load libtpu at once.
        alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return common | alone
    return common


def topology_devices(target: CompileTarget) -> list[Any]:
    """Return the abstract devices of a target, for a mesh to compile for.

    Raises: ConfigError if its compiler is not installed or rejects the shape.
    """
    from jax.experimental.topologies import get_topology_desc

    os.environ.update(environment(target))
    shape = "x".join(map(str, target.shape))
    try:
        if target.device.platform == "tpu":
            topology = get_topology_desc(
                platform="tpu", topology_name=f"{target.name}:{shape}", **dict(target.device.options)
            )
        else:
            config = Path(__file__).parent / "gpus" / f"{target.name}.txtpb"
            topology = get_topology_desc(platform="cuda", topology=f"1x{shape}", target_config=config.read_text())
    except Exception as error:  # plugins raise various types
        extra = {"tpu": "aot-tpu", "cuda": "aot-cuda"}[target.device.platform]
        raise ConfigError(
            f"target {target} cannot be compiled for here: {' '.join(str(error).split())[:200]}; "
            f"its compiler comes with pip install jaxmoe[{extra}]"
        ) from error
    return list(topology.devices)

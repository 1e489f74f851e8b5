"""Clusters one does not own: names, sizes and memory of the devices that XLA compiles for without having them."""

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
    """A kind of device. hbm_bytes: of one device of the mesh; devices_per_chip: how many of them a chip shows; options:
    what makes a topology of it show them so."""

    platform: Literal["tpu", "cuda"]
    hbm_bytes: int
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()


# Memory: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); of GPUs what a program may use (gpus/*.txtpb).
DEVICES: dict[str, TargetDevice] = {
    # its two cores as one device, as JAX shows them where there are some
    "v4": TargetDevice(platform="tpu", hbm_bytes=32 * _GIB, options=(("chip_config_name", "megacore"),)),
    "v5e": TargetDevice(platform="tpu", hbm_bytes=16 * _GIB),
    "v5p": TargetDevice(platform="tpu", hbm_bytes=95 * _GIB),
    "v6e": TargetDevice(platform="tpu", hbm_bytes=32 * _GIB),
    "tpu7x": TargetDevice(platform="tpu", hbm_bytes=96 * _GIB, devices_per_chip=2),
    "h100": TargetDevice(platform="cuda", hbm_bytes=84942979072),
    "h200": TargetDevice(platform="cuda", hbm_bytes=151397597184),
    "b200": TargetDevice(platform="cuda", hbm_bytes=191514411008),
}
_FLAT = ("v5e", "v6e")  # TPUs whose slices have two dims
_MAX_DEVICES = 1 << 16
_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*)*")


@dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """A cluster: so many chips along each dim of a TPU slice, or nodes x GPUs."""

    name: str
    shape: tuple[int, ...]

    @property
    def device(self) -> TargetDevice:
        """The kind of its devices."""
        return DEVICES[self.name]

    @property
    def num_devices(self) -> int:
        """Devices of a mesh over all of it."""
        return math.prod(self.shape) * self.device.devices_per_chip

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def parse_target(text: str) -> CompileTarget:
    """A Target from "v5p:4x4x8" or "h200:2x8". Raises: ConfigError naming what is not understood and what would be."""
    name, _, shape = text.partition(":")
    if name not in DEVICES:
        raise ConfigError(f"target {text!r}: unknown device {name!r}; there are {', '.join(DEVICES)}")
    example = "2x8" if DEVICES[name].platform == "cuda" else "4x4" if name in _FLAT else "4x4x4"
    dims = len(example.split("x"))
    if not _SHAPE.fullmatch(shape) or len(sizes := tuple(map(int, shape.split("x")))) != dims:
        raise ConfigError(f"target {text!r}: {name} needs {dims} sizes, as in {name}:{example}")
    target = CompileTarget(name=name, shape=sizes)
    if target.num_devices > _MAX_DEVICES:
        raise ConfigError(
            f"target {text!r} is of {target.num_devices} devices; at most {_MAX_DEVICES} are compiled for"
        )
    return target


def environment(target: CompileTarget) -> Mapping[str, str]:
    """Variables to set before JAX is imported, so that the target's compiler works without its devices."""
    common = {"JAX_PLATFORMS": "cpu"}
    if target.device.platform == "tpu":
        # The compiler alone needs no device, so several may run beside each other.
        alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return common | alone
    return common


def topology_devices(target: CompileTarget) -> list[Any]:
    """The devices of a target that is not there, for a mesh to compile for.

    Raises: ConfigError where its compiler is not installed, or refuses the shape.
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
    except Exception as error:  # whatever a plugin throws
        extra = {"tpu": "aot-tpu", "cuda": "aot-cuda"}[target.device.platform]
        raise ConfigError(
            f"target {target} cannot be compiled for here: {' '.join(str(error).split())[:200]}; "
            f"its compiler comes with pip install jaxmoe[{extra}]"
        ) from error
    return list(topology.devices)

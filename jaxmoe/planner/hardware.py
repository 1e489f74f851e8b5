"""Hardware facts: memory, rates and links of a kind of device, from a preset of meshes/ or a user's TOML file."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from jaxmoe.assets import asset_dir
from jaxmoe.errors import MeshError

Op = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
Topology = Literal["switch", "torus", "peers"]
Platform = Literal["cuda", "rocm", "tpu", "cpu"]
# (bytes of the whole message, microseconds), in the order of bytes
Points = tuple[tuple[float, float], ...]

_GIB = 1 << 30
# The share of a rate on paper that well-tuned programs attain; measured rates (jaxmoe probe) are attained whole.
_HBM, _COMPUTE, _LINK = 0.8, 0.7, 0.8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and how such devices are joined.

    hbm_gb: as sold; hbm_gib: what a program may use. *_gbps: 10^9 bytes a second of one device, links one way.
    devices_per_node: of one host. scale_up_devices: the most that one fast fabric joins, a node's of GPUs, a slice's of
    TPUs. scale_up: "switch" (all at full rate), "torus" (neighbours along torus_dims dims), "peers" (each pair has a
    link of its own). tflops: dense, by dtype: bf16, fp8, int8, fp4. attained: shares of these rates that programs get:
    hbm, compute, link. collectives: measured, by op and ranks, inside the fast fabric; where none is, rates are used.
    latency_us, scale_out_latency_us: of one message. dollars_an_hour: of one device.
    """

    device: str
    platform: Platform
    devices_per_node: int
    hbm_gb: float
    hbm_gib: float
    hbm_gbps: float
    scale_up_gbps: float
    scale_out_gbps: float
    tflops: Mapping[str, float]
    scale_up: Topology = "switch"
    scale_up_devices: int = 0
    torus_dims: int = 3
    nodes: int = 1
    latency_us: float = 6.0
    scale_out_latency_us: float = 25.0
    dollars_an_hour: float | None = None
    attained: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    collectives: Mapping[str, Mapping[int, Points]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for one in fields(self):
            value, name = getattr(self, one.name), one.name
            if name in ("device", "platform", "scale_up", "tflops", "attained", "collectives"):
                continue
            if name == "dollars_an_hour" and value is None:
                continue
            whole = name in ("devices_per_node", "scale_up_devices", "torus_dims", "nodes")
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
                what = "a whole number" if whole else "a number"
                raise MeshError(f"hardware {name}={value!r} must be {what} of at least 0")
            if name not in ("scale_up_devices", "dollars_an_hour", "latency_us", "scale_out_latency_us") and value == 0:
                raise MeshError(f"hardware {name}=0 must be above 0")
        for name, value, known in (
            ("platform", self.platform, get_args(Platform)), ("scale_up", self.scale_up, get_args(Topology)),
        ):  # fmt: skip
            if value not in known:
                raise MeshError(f"hardware {name}={value!r} must be one of {', '.join(known)}")
        if "bf16" not in self.tflops:
            raise MeshError("hardware [tflops] must give bf16")
        for name, rates in (("tflops", self.tflops), ("attained", self.attained)):
            for key, rate in rates.items():
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
                    raise MeshError(f"hardware [{name}] {key}={rate!r} must be a number above 0")
        if not self.scale_up_devices:
            object.__setattr__(self, "scale_up_devices", self.devices_per_node)

    @property
    def hbm_bytes(self) -> float:
        """What a program may use of a device's memory."""
        return self.hbm_gib * _GIB

    @property
    def bytes_a_second(self) -> float:
        """Of a device's memory, as programs attain it."""
        return self.hbm_gbps * 1e9 * self.attained.get("hbm", _HBM)

    def flops_a_second(self, dtype: str) -> float:
        """Of products in a dtype (bf16, fp8, int8, fp4), as programs attain it; a dtype without products of its own is
        computed in bf16."""
        return self.tflops.get(dtype, self.tflops["bf16"]) * 1e12 * self.attained.get("compute", _COMPUTE)

    def link_bytes_a_second(self, *, scale_out: bool) -> float:
        """Of a device's links, one way, as programs attain it."""
        rate = self.scale_out_gbps if scale_out else self.scale_up_gbps
        return rate * 1e9 * self.attained.get("link", _LINK)


def hardware_names() -> list[str]:
    """Presets of meshes/ that say what hardware is, sorted."""
    return sorted(name for name, raw in _presets().items() if "device" in raw.get("hardware", {}))


def read_hardware(name: str) -> Hardware:
    """The hardware of a preset (b200), of a mesh preset that names one, or of a TOML file.

    Raises: MeshError naming the file, the key and what would be accepted, or the nearest presets.
    """
    path = Path(name).expanduser()
    if name in (presets := _presets()):
        return _hardware(presets[name], name)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(name.lower(), hardware_names(), 3, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise MeshError(
            f"hardware {name!r} is no preset and no TOML file; {hint}presets: {', '.join(hardware_names())}"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise MeshError(f"hardware {name}: not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MeshError(f"hardware {name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _hardware(raw, name)


def _presets() -> dict[str, dict[str, Any]]:
    return {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in asset_dir("meshes").glob("*.toml")
    }  # fmt: skip


def _hardware(raw: Mapping[str, Any], name: str) -> Hardware:
    for table in raw:
        if table not in ("axes", "hardware", "tflops", "attained", "collectives"):
            raise MeshError(
                f"hardware {name}: unknown table [{table}]; there are axes, hardware, tflops, attained, collectives"
            )
    facts = raw.get("hardware")
    if not isinstance(facts, Mapping):
        raise MeshError(f"hardware {name} has no table [hardware]: add it, as in meshes/h100.toml")
    facts, based = dict(facts), {}
    if "preset" in facts:
        base = read_hardware(str(facts.pop("preset")))
        based = {one.name: getattr(base, one.name) for one in fields(base)}
    known = [one.name for one in fields(Hardware) if one.name not in ("tflops", "attained", "collectives")]
    for key in facts:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise MeshError(f"hardware {name}: unknown key {key!r} in [hardware]; {hint}")
    for table in ("tflops", "attained"):
        if table in raw:
            if not isinstance(raw[table], Mapping):
                raise MeshError(f"hardware {name}: {table} must be a table of numbers")
            facts[table] = MappingProxyType(dict(raw[table]))
    if "collectives" in raw:
        facts["collectives"] = _collectives(raw["collectives"], name)
    facts = based | facts
    optional = ("scale_up", "scale_up_devices", "torus_dims", "nodes", "latency_us", "scale_out_latency_us",
                "dollars_an_hour")  # fmt: skip
    for key in [*known, "tflops"]:
        if key not in facts and key not in optional:
            where = "table [tflops]" if key == "tflops" else f"key {key!r} in [hardware]"
            raise MeshError(f"hardware {name} has no {where}: add it, as in meshes/h100.toml")
    try:
        return Hardware(**facts)
    except MeshError as error:
        raise MeshError(f"{name}: {error}") from error


def _collectives(raw: Any, name: str) -> Mapping[str, Mapping[int, Points]]:
    found: dict[str, Mapping[int, Points]] = {}
    for op, tables in raw.items() if isinstance(raw, Mapping) else [(raw, None)]:
        if op not in get_args(Op) or not isinstance(tables, Mapping):
            raise MeshError(f"hardware {name}: [collectives.{op}] must be a table of one of {', '.join(get_args(Op))}")
        by_ranks = {}
        for ranks, points in tables.items():
            where = f"hardware {name}: [collectives.{op}] {ranks}"
            try:
                listed = sorted((float(size), float(us)) for size, us in points)
            except (TypeError, ValueError):
                listed = []
            if not listed or any(size <= 0 or us <= 0 for size, us in listed):
                raise MeshError(f"{where} must be a list of [bytes, microseconds], both above 0")
            if not ranks.isascii() or not ranks.isdigit() or int(ranks) < 2:
                raise MeshError(f"{where}: {ranks!r} must be a number of ranks of at least 2")
            by_ranks[int(ranks)] = tuple(listed)
        found[op] = MappingProxyType(dict(sorted(by_ranks.items())))
    return MappingProxyType(found)

"""Read hardware facts: memory, rates and links of a device, from a preset in meshes/ or a user's TOML file."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

from jaxmoe.assets import asset_dir
from jaxmoe.checks import is_finite
from jaxmoe.config import canonical_dtype
from jaxmoe.errors import MeshError
from jaxmoe.parallel.mesh import AXES
from jaxmoe.paths import expanded

MeasuredOp = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
Topology = Literal["switch", "torus", "peers"]
Platform = Literal["cuda", "rocm", "tpu", "cpu"]
# (bytes of the whole message, microseconds), in the order of bytes
Points = tuple[tuple[float, float], ...]

_MIN = 1e-9  # least value of any nonzero number
_MAX_TORUS_DIMS = 3
_MORE_GIB = 1.1  # limit of hbm_gib / hbm_gb: memory sold as 16 GB may be 16 GiB, not more
# Link facts behind each table of measured collectives. If a file changes one of them, or attained.link, the measured
# tables of its preset are not valid any more.
_LINK_FACTS = {
    "collectives": ("scale_up", "scale_up_gbps", "latency_us", "torus_dims"),
    "collectives_between_nodes": ("scale_out_gbps", "scale_out_latency_us"),
}

# Tables other than [hardware] and [axes], and the keys of the tables of rates
_COLLECTIVES = ("collectives", "collectives_between_nodes")
_RATES = {"tflops": ("bf16", "f32", "fp8", "int8", "fp4"), "attained": ("hbm", "compute", "link")}
_RATE_NAMES = {"bfloat16": "bf16", "float16": "bf16", "float32": "f32"}  # aliases of dtypes in [tflops]

_GIB = 1 << 30
_LARGEST = 1e18  # upper limit of any number
# Default share of a peak rate that well-tuned programs attain. Measured rates (jaxmoe probe) have a share of 1.
_HBM, _COMPUTE, _LINK = 0.8, 0.8, 0.8


class _FactError(MeshError):
    """Report an invalid hardware fact. place: its table and key in the file."""

    def __init__(self, message: str, *place: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """Describe one kind of device and its interconnect.

    hbm_gb: nominal memory. hbm_gib: memory that a program may use. hbm_gbps: memory bandwidth in 10^9 bytes/s.
    scale_up_gbps, scale_out_gbps: link bandwidth of one device in one direction, in 10^9 bytes/s, inside and between
    scale-up domains. devices_per_node: devices of one host. scale_up_devices: most devices of one scale-up domain (the
    GPUs of an NVLink domain, a slice of TPUs); by default devices_per_node.

    scale_up: "switch" (all devices at full rate), "torus" (neighbors along torus_dims dims) or "peers" (a separate link
    for each pair). tflops: dense peak TFLOP/s by dtype: bf16, f32, fp8, int8, fp4. attained: shares of the peak rates
    that programs attain: hbm, compute, link. collectives: measured times inside a scale-up domain, by op and number of
    ranks. collectives_between_nodes: measured times of ranks that are all on different nodes. Without measurements,
    times follow from the rates. latency_us, scale_out_latency_us: latency of one message. dollars_per_hour: price of
    one device.
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
    scale_out_latency_us: float = 30.0
    dollars_per_hour: float | None = None
    attained: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    collectives: Mapping[str, Mapping[int, Points]] = field(default_factory=lambda: MappingProxyType({}))
    collectives_between_nodes: Mapping[str, Mapping[int, Points]] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for one in fields(self):
            value, name = getattr(self, one.name), one.name
            if name in ("platform", "scale_up", *_RATES, *_COLLECTIVES):
                continue
            if name == "dollars_per_hour" and value is None:
                continue
            if name == "device":
                if not isinstance(value, str) or not value:
                    raise _FactError(f"hardware device={value!r} must be a name", "hardware", name)
                continue
            whole = name in ("devices_per_node", "scale_up_devices", "torus_dims", "nodes")
            if not _is_number(value) or value < 0 or (whole and not isinstance(value, int)):
                what = f"{'a whole number' if whole else 'a number'} of at least 0 and below {_LARGEST:g}"
                raise _FactError(f"hardware {name}={value!r} must be {what}", "hardware", name)
            if (
                name not in ("scale_up_devices", "dollars_per_hour", "latency_us", "scale_out_latency_us")
                and value == 0
            ):
                raise _FactError(f"hardware {name}=0 must be above 0", "hardware", name)
            if 0 < value < _MIN:
                raise _FactError(f"hardware {name}={value!r} must be at least {_MIN:g}", "hardware", name)
        if self.torus_dims > _MAX_TORUS_DIMS:
            raise _FactError(
                f"hardware torus_dims={self.torus_dims} must lie in [1, {_MAX_TORUS_DIMS}]", "hardware", "torus_dims"
            )
        if self.hbm_gib > _MORE_GIB * self.hbm_gb:
            raise _FactError(
                f"hardware hbm_gib={self.hbm_gib:g} must not exceed the nominal memory, hbm_gb={self.hbm_gb:g}: it is "
                f"the part that a program may use", "hardware", "hbm_gib",
            )  # fmt: skip
        for name, value, known in (
            ("platform", self.platform, get_args(Platform)), ("scale_up", self.scale_up, get_args(Topology)),
        ):  # fmt: skip
            if value not in known:
                raise _FactError(f"hardware {name}={value!r} must be one of {', '.join(known)}", "hardware", name)
        if "bf16" not in self.tflops:
            raise _FactError("hardware [tflops] must give bf16", "tflops")
        for name, names in _RATES.items():
            for key, rate in getattr(self, name).items():
                if key not in names:
                    raise _FactError(f"hardware [{name}] {key}: valid keys are {', '.join(names)}", name, key)
                if not _is_number(rate) or rate <= 0:
                    raise _FactError(
                        f"hardware [{name}] {key}={rate!r} must be a number above 0 and below {_LARGEST:g}", name, key
                    )
                if rate < _MIN:
                    raise _FactError(f"hardware [{name}] {key}={rate!r} must be at least {_MIN:g}", name, key)
                if name == "attained" and rate > 1:
                    raise _FactError(f"hardware [{name}] {key}={rate!r} is a share of a rate: at most 1", name, key)
        if not self.scale_up_devices:
            object.__setattr__(self, "scale_up_devices", self.devices_per_node)

    @cached_property
    def priced(self) -> dict[tuple[Hashable, ...], dict[Any, Any]]:
        """Cache the estimates for this hardware: collectives (links.py) and compute (cost.py), by all their inputs."""
        return {}

    @property
    def hbm_bytes(self) -> float:
        """Return the bytes of a device's memory that a program may use."""
        return self.hbm_gib * _GIB

    @property
    def fabric(self) -> str:
        """Return the common name of a scale-up domain: "slice" for TPUs, "node", or "fabric" if larger than a node."""
        if self.scale_up == "torus":
            return "slice"
        return "node" if self.scale_up_devices <= self.devices_per_node else "fabric"

    @property
    def bytes_per_s(self) -> float:
        """Return the attainable memory bandwidth of a device."""
        return self.hbm_gbps * 1e9 * self.attained.get("hbm", _HBM)

    def flops_per_s(self, dtype: str) -> float:
        """Return the attainable FLOP/s of matmuls in a dtype: bf16, f32, fp8, int8 or fp4.

        A dtype that the hardware does not support is computed in bf16.
        """
        return self.tflops.get(dtype, self.tflops["bf16"]) * 1e12 * self.attained.get("compute", _COMPUTE)

    def link_bytes_per_s(self, *, scale_out: bool) -> float:
        """Return the attainable link bandwidth of a device in one direction."""
        rate = self.scale_out_gbps if scale_out else self.scale_up_gbps
        return rate * 1e9 * self.attained.get("link", _LINK)


def names_nodes(name: str) -> bool:
    """Return whether a preset or file for read_hardware sets the number of nodes, including 1."""
    raw = hardware_presets().get(name)
    if raw is None:
        raw = tomllib.loads(expanded(name, "hardware", MeshError).read_text(encoding="utf-8"))
    return "nodes" in raw["hardware"]


def hardware_names() -> list[str]:
    """Return the sorted presets of meshes/ that describe a device."""
    return sorted(name for name, raw in hardware_presets().items() if "device" in raw.get("hardware", {}))


def read_hardware(name: str) -> HardwareSpec:
    """Read the hardware of a preset (b200), of a mesh preset that names one, or of a TOML file.

    Raises: MeshError naming the file, the line, the key and the accepted values, or the nearest presets.
    """
    if name in hardware_presets():
        return _hardware(hardware_presets()[name], name)
    path = expanded(name, "hardware", MeshError)
    if path.suffix != ".toml" and not path.is_file():
        names = sorted(key for key, raw in hardware_presets().items() if "hardware" in raw)
        raise MeshError(f"hardware {name!r} is no preset and no TOML file; {_presets_like(name, names)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MeshError(f"hardware {name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        raw = tomllib.loads(text)
    except RecursionError as error:
        raise MeshError(f"hardware {name}: not TOML: lists too deep") from error
    except ValueError as error:  # a TOMLDecodeError, or a number of more digits than Python reads
        raise MeshError(_not_toml(text, name, str(error))) from error
    try:
        return _hardware(raw, name)
    except _FactError as error:
        line = line_of(text, *error.place)
        raise MeshError(f"{name}{f' line {line}' * bool(line)}: {error}") from error


@cache
def hardware_presets() -> dict[str, dict[str, Any]]:
    """Read every file of meshes/, by name."""
    return {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in asset_dir("meshes").glob("*.toml")
    }  # fmt: skip


def line_of(text: str, *place: str) -> int | None:
    """Return the line number of a key in the text of a TOML file, else of the nearest table around it.

    place: the key's tables, then the key.
    """
    table: tuple[str, ...] = ()
    line_numbers: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+([^\]]+)\]", line):
            table = _parts(header[1])
            here = table
        elif key := re.match(r"\s*([^\s=#\[\]][^=#\[\]]*?)\s*=", line):
            here = (*table, *_parts(key[1]))
        else:
            continue
        for depth in range(1, len(here) + 1):
            line_numbers.setdefault(here[:depth], number)
    return next(
        (line_numbers[place[:depth]] for depth in range(len(place), 0, -1) if place[:depth] in line_numbers), None
    )


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _not_toml(text: str, name: str, said: str) -> str:
    """Return the parser's message for a file, with the line number and the text of the line."""
    lines = text.splitlines() or [""]
    at = re.search(r"\(at line (\d+), column \d+\)", said)
    if "integer string conversion" in said:
        number = next((place for place, line in enumerate(lines, 1) if re.search(r"[\d_]{4300}", line)), len(lines))
        said = "a number of too many digits"
    else:
        number = min(int(at[1]), len(lines)) if at else len(lines)
    return f"{name} line {number}: not TOML: {said}: {lines[number - 1].strip()[:60]!r}"


def _presets_like(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}presets: {', '.join(hardware_names())}"


def _is_number(value: object) -> bool:
    return is_finite(value, below=_LARGEST)


def _hardware(raw: Mapping[str, Any], name: str) -> HardwareSpec:
    tables = ("axes", "hardware", *_RATES, *_COLLECTIVES)
    for table in raw:
        if table not in tables:
            raise _FactError(f"unknown table [{table}]; valid tables are {', '.join(tables)}", table)
        if not isinstance(raw[table], Mapping):
            raise _FactError(f"{table} must be a table, as in meshes/h100.toml", table)
    _check_axes(raw.get("axes", {}))
    if "hardware" not in raw:
        raise _FactError(f"hardware {name} has no table [hardware]: add it, as in meshes/h100.toml")
    facts, based = dict(raw["hardware"]), {}
    if "preset" in facts:
        base = facts.pop("preset")
        if base not in hardware_names():
            what = "a mesh" if str(base) in hardware_presets() else "no preset"
            known = _presets_like(str(base), hardware_names())
            raise _FactError(f"hardware preset={base!r} is {what}; {known}", "hardware", "preset")
        read = read_hardware(base)
        based = {one.name: getattr(read, one.name) for one in fields(read)}
    keys = [one.name for one in fields(HardwareSpec) if one.name not in (*_RATES, *_COLLECTIVES)]
    for key in facts:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(keys)}"
            raise _FactError(f"unknown key {key!r} in [hardware]; {hint}", "hardware", key)
    for table in _RATES:
        if table in raw:
            facts[table] = MappingProxyType({**based.get(table, {}), **_rates(raw[table], table)})
    kept = _not_contradicted(based, facts)
    for table in _COLLECTIVES:
        if table in raw:
            facts[table] = MappingProxyType({**kept.get(table, {}), **_collectives(raw[table], table)})
    facts = kept | facts
    optional = ("scale_up", "scale_up_devices", "torus_dims", "nodes", "latency_us", "scale_out_latency_us",
                "dollars_per_hour")  # fmt: skip
    for key in [*keys, "tflops"]:
        if key not in facts and key not in optional:
            where = "table [tflops]" if key == "tflops" else f"key {key!r} in [hardware]"
            raise _FactError(f"hardware {name} has no {where}: add it, as in meshes/h100.toml", "hardware")
    return HardwareSpec(**facts)


def _rates(raw: Mapping[str, Any], table: str) -> dict[str, Any]:
    """Return a table of rates with the dtype names of HardwareSpec; float16 is as fast as bfloat16."""
    rates: dict[str, Any] = {}
    for key, rate in raw.items():
        name = _RATE_NAMES.get(canonical_dtype(key), key) if table == "tflops" else key
        if rates.setdefault(name, rate) != rate:
            raise _FactError(
                f"hardware [{table}] {key}={rate!r} and {name}={rates[name]!r} differ: keep one", table, key
            )
    return rates


def _not_contradicted(based: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's facts without the ones that a file's own facts invalidate.

    Measured collectives are dropped if a fact of their links changes, and scale_up_devices if devices_per_node changes
    (except for a torus). If hbm_gb changes without hbm_gib, hbm_gib keeps its share of hbm_gb.
    """
    kept = dict(based)
    changed = {key for key, value in facts.items() if key in based and value != based[key]}
    link = "attained" in changed and facts["attained"].get("link") != based["attained"].get("link")
    for table, names in _LINK_FACTS.items():
        if link or changed.intersection(names):
            kept.pop(table, None)
    if "devices_per_node" in changed and based["scale_up"] != "torus":
        kept.pop("scale_up_devices")
    if "hbm_gb" in changed and "hbm_gib" not in facts and _is_number(facts["hbm_gb"]):
        kept["hbm_gib"] = based["hbm_gib"] * facts["hbm_gb"] / based["hbm_gb"]
    return kept


def _check_axes(axes: Mapping[str, Any]) -> None:
    for axis, size in axes.items():
        if axis not in AXES:
            raise _FactError(f"[axes] {axis}: valid axes are {', '.join(AXES)}", "axes", axis)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < _LARGEST:
            raise _FactError(f"[axes] {axis}={size!r} must be a whole number of at least 1", "axes", axis)


def _collectives(raw: Mapping[str, Any], table: str) -> Mapping[str, Mapping[int, Points]]:
    measured: dict[str, Mapping[int, Points]] = {}
    for op, tables in raw.items():
        if op not in get_args(MeasuredOp) or not isinstance(tables, Mapping):
            raise _FactError(f"[{table}.{op}] must be a table of one of {', '.join(get_args(MeasuredOp))}", table, op)
        by_ranks = {}
        for ranks, points in tables.items():
            where, place = f"[{table}.{op}] {ranks[:20]}", (table, op, ranks)
            pairs = points if isinstance(points, list) and points else [None]
            for pair in pairs:
                right = isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and min(pair) >= _MIN
                if not right:
                    shown = f": {pair!r}"[:40] if pair is not None else ""
                    raise _FactError(f"{where} must be a list of [bytes, microseconds], both above 0{shown}", *place)
            if not re.fullmatch(r"[0-9]{1,9}", ranks) or int(ranks) < 2:
                raise _FactError(f"{where}: {ranks[:20]!r} must be a number of ranks of at least 2", *place)
            by_ranks[int(ranks)] = tuple(sorted((float(size), float(us)) for size, us in pairs))
        measured[op] = MappingProxyType(dict(sorted(by_ranks.items())))
    return MappingProxyType(measured)

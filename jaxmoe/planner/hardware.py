"""Hardware facts: memory, rates and links of a kind of device, from a preset of meshes/ or a user's TOML file."""

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
from jaxmoe.config import canonical_dtype
from jaxmoe.errors import MeshError
from jaxmoe.parallel.mesh import AXES
from jaxmoe.paths import expanded

MeasuredOp = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]
Topology = Literal["switch", "torus", "peers"]
Platform = Literal["cuda", "rocm", "tpu", "cpu"]
# (bytes of the whole message, microseconds), in the order of bytes
Points = tuple[tuple[float, float], ...]

_MIN = 1e-9  # of any number here that is not 0
_MAX_TORUS_DIMS = 3
_MORE_GIB = 1.1  # times hbm_gb: what is sold as 16 GB may be 16 GiB, not more
# Facts by which links are priced where no table was measured: those of a preset are no longer true where a file changes
# one. A share of rates attained is one of both.
_LINK_FACTS = {
    "collectives": ("scale_up", "scale_up_gbps", "latency_us", "torus_dims"),
    "collectives_between_nodes": ("scale_out_gbps", "scale_out_latency_us"),
}

# Tables beside [hardware] and [axes], and the keys of those that are numbers by name
_COLLECTIVES = ("collectives", "collectives_between_nodes")
_RATES = {"tflops": ("bf16", "f32", "fp8", "int8", "fp4"), "attained": ("hbm", "compute", "link")}
_RATE_NAMES = {"bfloat16": "bf16", "float16": "bf16", "float32": "f32"}  # of dtypes, in [tflops]

_GIB = 1 << 30
_LARGEST = 1e18  # of any number here
# The share of a rate on paper that well-tuned programs attain; measured rates (jaxmoe probe) are attained whole.
_HBM, _COMPUTE, _LINK = 0.8, 0.8, 0.8


class _FactError(MeshError):
    """A fact that cannot be; place: its table and key in a file."""

    def __init__(self, message: str, *place: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """One kind of device and how such devices are joined.

    hbm_gb: as sold; hbm_gib: what a program may use. *_gbps: 10^9 bytes a second of one device, links one way.
    devices_per_node: of one host. scale_up_devices: the most that one fast fabric joins, a node's of GPUs, a slice's of
    TPUs. scale_up: "switch" (all at full rate), "torus" (neighbors along torus_dims dims), "peers" (each pair has a
    link of its own). tflops: dense, by dtype: bf16, f32, fp8, int8, fp4. attained: shares of these rates that programs
    get: hbm, compute, link. collectives: measured, by op and ranks, inside the fast fabric; collectives_between_nodes:
    of ranks that all lie on other nodes; where none is, rates are used.
    latency_us, scale_out_latency_us: of one message. dollars_per_hour: of one device.
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
                f"hardware hbm_gib={self.hbm_gib:g} must not exceed what is sold, hbm_gb={self.hbm_gb:g}: it is what a "
                f"program may use of that", "hardware", "hbm_gib",
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
                    raise _FactError(f"hardware [{name}] {key}: there are {', '.join(names)}", name, key)
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
        """What was priced on it before: collectives (links.py) and work (cost.py), each by all that decides it."""
        return {}

    @property
    def hbm_bytes(self) -> float:
        """What a program may use of a device's memory."""
        return self.hbm_gib * _GIB

    @property
    def fabric(self) -> str:
        """What people call the devices of one fast fabric: a node of GPUs, a slice of TPUs, else a fabric."""
        if self.scale_up == "torus":
            return "slice"
        return "node" if self.scale_up_devices <= self.devices_per_node else "fabric"

    @property
    def bytes_per_s(self) -> float:
        """Of a device's memory, as programs attain it."""
        return self.hbm_gbps * 1e9 * self.attained.get("hbm", _HBM)

    def flops_per_s(self, dtype: str) -> float:
        """Of products in a dtype (bf16, f32, fp8, int8, fp4), as programs attain it; a dtype without products of its
        own is computed in bf16."""
        return self.tflops.get(dtype, self.tflops["bf16"]) * 1e12 * self.attained.get("compute", _COMPUTE)

    def link_bytes_per_s(self, *, scale_out: bool) -> float:
        """Of a device's links, one way, as programs attain it."""
        rate = self.scale_out_gbps if scale_out else self.scale_up_gbps
        return rate * 1e9 * self.attained.get("link", _LINK)


def names_nodes(name: str) -> bool:
    """Whether hardware that read_hardware reads says how many nodes there are; one is a number of them, too."""
    raw = hardware_presets().get(name)
    if raw is None:
        raw = tomllib.loads(expanded(name, "hardware", MeshError).read_text(encoding="utf-8"))
    return "nodes" in raw["hardware"]


def hardware_names() -> list[str]:
    """Presets of meshes/ that say what hardware is, sorted."""
    return sorted(name for name, raw in hardware_presets().items() if "device" in raw.get("hardware", {}))


def read_hardware(name: str) -> HardwareSpec:
    """The hardware of a preset (b200), of a mesh preset that names one, or of a TOML file.

    Raises: MeshError naming the file, the line, the key and what would be accepted, or the nearest presets.
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
    """What stands in each file of meshes/, by name."""
    return {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in asset_dir("meshes").glob("*.toml")
    }  # fmt: skip


def line_of(text: str, *place: str) -> int | None:
    """Where in the text of a TOML file a key stands (its tables, then itself), else the nearest table around it."""
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
    """What the parser said of a file, with the line and what stands there."""
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _hardware(raw: Mapping[str, Any], name: str) -> HardwareSpec:
    tables = ("axes", "hardware", *_RATES, *_COLLECTIVES)
    for table in raw:
        if table not in tables:
            raise _FactError(f"unknown table [{table}]; there are {', '.join(tables)}", table)
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
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}"
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
    """A table of rates, its dtypes by the names that Hardware has for them; float16 is as fast as bfloat16."""
    rates: dict[str, Any] = {}
    for key, rate in raw.items():
        name = _RATE_NAMES.get(canonical_dtype(key), key) if table == "tflops" else key
        if rates.setdefault(name, rate) != rate:
            raise _FactError(
                f"hardware [{table}] {key}={rate!r} and {name}={rates[name]!r} differ: keep one", table, key
            )
    return rates


def _not_contradicted(based: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a preset's facts, those that still hold beside a file's own: measured times of links until a fact of such
    links is another, a fast fabric of as many devices as a node has until a node has others, and the share of memory
    that a program may use."""
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
            raise _FactError(f"[axes] {axis}: there are {', '.join(AXES)}", "axes", axis)
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

"""Parse the collectives of a compiled program from its HLO text: op, mesh axes, bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import get_args

import numpy as np
from jax.sharding import Mesh

from jaxmoe.parallel.collectives import CollectiveKind, CollectiveOp

_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "s16": 16, "u16": 16}
_ITEM_BITS |= {"s32": 32, "u32": 32, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
# Other collectives. No step uses them, so they are an error.
_UNKNOWN = ("collective-broadcast", "ragged-all-gather", "send", "recv")
_LINE = re.compile(
    rf"= (?P<result>\(?.*?\)?) (?P<op>{'|'.join((*get_args(CollectiveKind), *_UNKNOWN))})(?P<start>-start)?\("
)
_NESTED = re.compile(r"\(\([^()]*(?:\([^()]*\)[^()]*)*\), (.*)\)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>[^)]*(?:\([^)]*\))?)\))? \{(?P<over>[^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_LIST_GROUPS = re.compile(r"replica_groups=\{(?P<groups>\{[\d,{}]*\})\}")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.-]+) .*\{$")
_CALLED = re.compile(
    r"(body|calls|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(%[\w.-]+|\{[^}]*\})"
)
_NAMES = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.-]+)")
_COMPARED = re.compile(r"ROOT %\S+ = \S+ compare\(%[\w.-]+, %([\w.-]+)\), direction=LT")
# XLA:TPU prints some reduce-scatters as a fusion of an all-reduce and a slice of its result, in a computation of this
# name. On the links it is a reduce-scatter (docs/clusters.md). Some are padded; collective-permutes then send on slices
# of the result.
_SCATTER = "all-reduce-scatter"
_OPERAND = re.compile(r"= ([^ ]*) parameter\(0\)")
_SCATTERED = re.compile(rf"%(?P<result>[\w.-]+) = .* calls=%{_SCATTER}")
_SLICED = re.compile(r"%(?P<part>[\w.-]+) = \S+ slice\(%(?P<whole>[\w.-]+)\)")
_PERMUTED = re.compile(r" collective-permute(?:-start)?\(%([\w.-]+)\)")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>\{[\d,{}]*\})\}")


def collectives(compiled_text: str, mesh: Mesh) -> Counter[CollectiveOp]:
    """Count the collectives in the text of a compiled program, by how often each runs.

    A collective inside a loop counts once per iteration if the trip count is known, else once. If its groups span only
    a part of the devices along their axes, the name of its axes says so ("2 ranks of expert").
    Raises: ValueError for an unknown form of replica groups, or an unknown kind of collective.
    """
    return collectives_and_padding(compiled_text, mesh)[0]


def collectives_and_padding(compiled_text: str, mesh: Mesh) -> tuple[Counter[CollectiveOp], float]:
    """Count collectives without padding, and return the padding of reduce-scatters as a fraction of their bytes.

    XLA:TPU pads some reduce-scatters. Raises: as collectives.
    """
    counts: Counter[CollectiveOp] = Counter()
    added = 0
    lines, entry = _computations(compiled_text)
    realigned = _scattered_slices(lines)
    for name, line, times in _lines_run(lines, entry):
        match = _LINE.search(line)
        if match is None:
            continue
        op = match["op"]
        if op in _UNKNOWN:
            raise ValueError(f"a collective that is not known here, {op}: {line.strip()[:300]}")
        groups = _groups(line)
        axes = _axes(groups, mesh)
        if op != "collective-permute" and groups.shape[1] != math.prod(mesh.shape[axis] for axis in axes):
            axes = (f"{groups.shape[1]} ranks of {' x '.join(axes)}",)
        if not axes:
            continue
        result = match["result"]
        nested = match["start"] and _NESTED.match(result)  # ((operands), results)
        arrays = _ARRAY.findall(nested[1] if nested else result)
        if nested:  # skip the context scalars (u32[], s32[]) that -start returns with its results
            arrays = [(kind, shape) for kind, shape in arrays if shape or kind not in ("u32", "s32")] or arrays
        sizes = [_array_bytes(kind, shape) for kind, shape in arrays]
        if match["start"] and not nested and len(sizes) > 1:  # (operand, result, ...)
            if op == "collective-permute":
                sizes = sizes[1:2]
            elif op != "all-reduce":  # an all-reduce returns results only
                sizes = sizes[len(sizes) // 2 :]
        num_bytes = sum(sizes)
        if op == "collective-permute" and (permuted := _PERMUTED.search(line)) and permuted[1] in realigned:
            added += num_bytes * times
            continue
        if op == "all-reduce" and name.startswith(_SCATTER):
            operand = _OPERAND.search("\n".join(lines[name]))
            requested = sum(_array_bytes(*array) for array in _ARRAY.findall(operand[1])) if operand else num_bytes
            added += (num_bytes - requested) // groups.shape[1] * times
            op, num_bytes = "reduce-scatter", requested // groups.shape[1]
        counts[CollectiveOp(op=op, axes=axes, result_bytes=num_bytes)] += times  # type: ignore[arg-type]
    requested = sum(one.result_bytes * times for one, times in counts.items() if one.op == "reduce-scatter")
    return counts, added / requested if added else 0.0


def _scattered_slices(lines: Mapping[str, list[str]]) -> set[str]:
    """Return the names of values that are slices of the result of an all-reduce-scatter fusion."""
    every = [line for body in lines.values() for line in body]
    results = {match["result"] for line in every if (match := _SCATTERED.search(line))}
    sliced = [match for line in every if (match := _SLICED.search(line))]
    return {match["part"] for match in sliced if match["whole"] in results}


def _computations(compiled_text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by its name, and the name of the entry computation."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in compiled_text.splitlines():
        if header := _HEADER.match(line):
            name = header["name"]
            lines[name] = []
            entry = name if header["entry"] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _lines_run(lines: Mapping[str, list[str]], entry: str) -> Iterator[tuple[str, str, int]]:
    """Yield every line that runs, as (name of its computation, line, how often it runs)."""
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in lines[name]:
            for role, names in _CALLED.findall(line):
                trip_count = _trip_count(line, lines) if role == "body" else 1
                for callee in _NAMES.findall(names):
                    visit(callee, times * trip_count)

    visit(entry, 1)
    return ((name, line, runs[name]) for name, body in lines.items() for line in body if runs[name])


def _trip_count(loop: str, lines: Mapping[str, list[str]]) -> int:
    """Return the trip count of a loop: the known_trip_count, or the constant in its condition, or else 1."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = _CONDITION.search(loop)
    body = "\n".join(lines[condition[1]]) if condition else ""
    compared = _COMPARED.search(body)
    bound = compared and re.search(rf"%{re.escape(compared[1])} = s32\S* constant\((\d+)\)", body)
    return int(bound[1]) if bound else 1


def _array_bytes(kind: str, shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n) * _ITEM_BITS[kind] // 8


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _groups(line: str) -> np.ndarray:
    """Parse the replica groups [groups, members] of an instruction, in any form that XLA prints."""
    if match := _MESH_GROUPS.search(line):
        names = re.findall(r"'([^']+)'=(\d+)", match["axes"])
        shape = [int(size) for _, size in names]
        ids = np.arange(math.prod(shape))
        if match["ids"]:
            dims, _, order = match["ids"].partition("T")
            ids = ids.reshape(_ints(dims))
            ids = ids.transpose(_ints(order)) if order else ids
        over = set(re.findall(r"'([^']+)'", match["over"]))
        last = [at for at, (name, _) in enumerate(names) if name in over]
        first = [at for at in range(len(names)) if at not in last]
        ids = ids.reshape(shape).transpose(first + last)
        return ids.reshape(-1, math.prod(shape[at] for at in last))
    if match := _IOTA_GROUPS.search(line):
        source = _ints(match["source"])
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(_ints(match["order"])) if match["order"] else ids
        return ids.reshape(_ints(match["shape"]))
    if match := _LIST_GROUPS.search(line) or _PAIRS.search(line):
        return np.array([_ints(group) for group in match[1].split("},{")])
    raise ValueError(f"replica groups not understood: {line.strip()[:300]}")


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ, in the order of the mesh."""
    shape = tuple(mesh.shape.values())
    coordinates = np.stack(np.unravel_index(groups, shape), axis=-1)
    differs = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, moved in zip(mesh.axis_names, differs, strict=True) if moved)

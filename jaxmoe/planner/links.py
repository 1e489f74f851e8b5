"""What a collective costs: the devices that take part, the links between them, measured times where there are any.

Times are read off measured tables piecewise, in the logarithms of bytes and of microseconds; a straight line between
a latency and a bandwidth errs by 21 to 56% (ai-dynamo/aiconfigurator's tables of NCCL). Beyond a table, and where none
was measured, rings are counted in bytes and steps. Between nodes a collective is taken apart: within every node
first, then each device with its equals of the other nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from jaxmoe.parallel.collectives import Collective, CollectiveOp, sent_of
from jaxmoe.parallel.mesh import AXES
from jaxmoe.planner.hardware import HardwareSpec, Points

# Small all-reduces inside a node need no library: one kernel reads the message of every peer. vllm-project/vllm#37756
# has 7 us for 16 KiB, 11 for 512 KiB and 17 for 1 MiB among 8 B300, #19744 7.2, 14.7 and 22.9 among 4 MI300X; to which
# comes a launch, as in cost.py.
_KERNEL_PLATFORMS, _KERNEL_SECONDS, KERNEL_BYTES = ("cuda", "rocm"), 10e-6, 2 << 20


@dataclass(frozen=True)
class RankGroup:
    """Devices that a collective joins: `ranks` in all, `inside` of them on one fast fabric; apart: how many devices
    lie between neighbors there."""

    ranks: int
    inside: int
    apart: int = 1

    @property
    def across(self) -> int:
        """Fabrics that take part."""
        return -(-self.ranks // self.inside)


def group_of(axes: tuple[str, ...], sizes: Mapping[str, int], domain: int) -> RankGroup:
    """The devices along some axes of a mesh whose devices fill fabrics of `domain` each, tensor innermost."""
    return _group(axes, tuple(sizes.get(axis, 1) for axis in AXES), domain)


@lru_cache(maxsize=4096)
def _group(axes: tuple[str, ...], sizes: tuple[int, ...], domain: int) -> RankGroup:
    places, starts, stride, apart = [0], [0], 1, 0
    for axis, size in zip(reversed(AXES), reversed(sizes), strict=True):
        steps = [stride * step for step in range(size)]
        if axis in axes and size > 1:
            places = [place + step for step in steps for place in places]
            apart = apart or stride
        else:  # where groups begin, as far as it matters to fabrics
            starts = sorted({(start + step) % domain for step in steps for start in starts})
        stride *= size
    # The group that lies worst: the others wait for it.
    inside = min(min(Counter((start + place) // domain for place in places).values()) for start in starts)
    return RankGroup(len(places), inside, apart or 1)


class LinkModel:
    """Prices collectives on one kind of hardware, in seconds."""

    def __init__(self, hardware: HardwareSpec, *, devices: int) -> None:
        """devices: of the whole mesh; a torus is taken as near to a cube as they are."""
        self.hardware = hardware
        self._side = max(2.0, devices ** (1 / hardware.torus_dims))
        self._priced: dict[tuple[CollectiveOp, int, RankGroup], float] = hardware.priced.setdefault(
            ("links", self._side), {}
        )

    def seconds(self, collective: Collective, group: RankGroup) -> float:
        """Of one collective among a group."""
        op: CollectiveOp = "all-to-all" if collective.op == "ragged-all-to-all" else collective.op
        whole = collective.whole_bytes(group.ranks)
        if group.ranks == 1 or not whole:
            return 0.0
        if (price := self._priced.get((op, whole, group))) is None:
            price = self._priced[op, whole, group] = self._price(op, whole, group)
        return price

    def _price(self, op: CollectiveOp, whole: int, group: RankGroup) -> float:
        inside, across = group.inside, group.across
        if across == 1:
            return self._within(op, whole, group)
        if op == "collective-permute":
            return self._far(op, whole, 2)
        if op == "all-to-all":
            near = self._within(op, whole * inside / group.ranks, group) if inside > 1 else 0.0
            return max(near, self._far(op, whole / inside, across, times=inside))
        far = self._far(op, whole / inside, across)  # of what a device and its equals of other fabrics have
        if inside == 1:
            return far
        return far + self._within(op, whole, group)  # a reduce-scatter and an all-gather are an all-reduce

    def _far(self, op: CollectiveOp, whole: float, ranks: int, *, times: int = 1) -> float:
        """Among devices of as many fabrics, each beside its neighbors of the same; of `times` such messages."""
        if tables := self.hardware.collectives_between_nodes.get(op):
            return self._measured(tables, op, whole * times, ranks)
        steps = 1 if op in ("collective-permute", "all-to-all") else ranks * (2 if op == "all-reduce" else 1)
        return self._out(sent_of(op, whole * times, ranks), steps)

    def _out(self, sent: float, steps: int) -> float:
        """So many bytes of a device to other fabrics; steps grow a tree's way."""
        hardware = self.hardware
        latency = hardware.scale_out_latency_us * 1e-6 * max(1.0, math.log2(steps))
        return latency + sent / hardware.link_bytes_per_s(scale_out=True)

    def _within(self, op: CollectiveOp, whole: float, group: RankGroup) -> float:
        ranks = group.inside
        if op == "all-reduce" and whole <= KERNEL_BYTES and self.hardware.platform in _KERNEL_PLATFORMS:
            return min(self._listed(op, whole, ranks), self._by_a_kernel(whole, ranks))
        return self._listed(op, whole, ranks)

    def _by_a_kernel(self, whole: float, ranks: int) -> float:
        """An all-reduce by one kernel that reads its peers' memory: all of every message at once, or each its part
        and then the sums of the others."""
        once = _KERNEL_SECONDS + self._sent_seconds("all-gather", whole * ranks, ranks)
        twice = 2 * (_KERNEL_SECONDS + self._sent_seconds("all-gather", whole, ranks))
        return min(once, twice)

    def _listed(self, op: CollectiveOp, whole: float, ranks: int) -> float:
        if tables := self.hardware.collectives.get(op):
            return self._measured(tables, op, whole, ranks)
        steps = math.log2(ranks) if self.hardware.scale_up == "switch" else ranks / 2
        latency = self.hardware.latency_us * 1e-6 * max(1.0, min(steps, 8.0))
        return latency + self._sent_seconds(op, whole, ranks)

    def _measured(self, tables: Mapping[int, Points], op: CollectiveOp, whole: float, ranks: int) -> float:
        """Interpolate the table of the nearest number of ranks; for another number at equal bytes per device, with
        latency growing as log2(ranks)."""
        near = min(tables, key=lambda n: (abs(math.log2(n / ranks)), n))
        sent = sent_of(op, whole, ranks) / sent_of(op, 1, near)
        more = tables[near][0][1] * (math.log2(ranks) / math.log2(near) - 1)
        return (_read(tables[near], sent) + max(more, -0.5 * tables[near][0][1])) * 1e-6

    def _sent_seconds(self, op: CollectiveOp, whole: float, ranks: int) -> float:
        """By the bytes each device sends, over the links that the group can use."""
        hardware = self.hardware
        rate = hardware.link_bytes_per_s(scale_out=False)
        if hardware.scale_up == "peers":
            rate *= (ranks - 1) / (hardware.scale_up_devices - 1)
        if hardware.scale_up == "torus":
            dims = min(hardware.torus_dims, max(1, math.ceil(math.log(ranks, self._side) - 1e-9)))
            rate *= dims / hardware.torus_dims
            if op == "all-to-all":  # every byte takes a quarter of a ring's hops along each dim, either way round
                return whole * max(1.0, min(self._side, ranks) / 4) / rate
        return sent_of(op, whole, ranks) / rate


def _read(points: Points, size: float) -> float:
    """Microseconds of a message of `size` bytes."""
    if size <= points[0][0]:
        return points[0][1]
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    at = bisect_left(points, (size, 0.0))
    (low, before), (high, after) = points[at - 1], points[at]
    share = math.log(size / low) / math.log(high / low)
    return math.exp(math.log(before) + share * math.log(after / before))

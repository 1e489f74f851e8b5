"""Estimate the time of a collective from its devices, the links between them, and measured times if available.

Measured tables are interpolated piecewise linearly in the logarithms of bytes and microseconds; a linear model of
latency and bandwidth has errors of 21 to 56% (ai-dynamo/aiconfigurator's tables of NCCL). Times of messages larger than
a table's last scale with their bytes. Without a table, rings are estimated from bytes and steps. A collective across
nodes is hierarchical: first inside every node, then between devices of the same index in different nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from jaxmoe.parallel.collectives import CollectiveKind, CollectiveOp, sent_of
from jaxmoe.parallel.mesh import AXES
from jaxmoe.planner.hardware import HardwareSpec, Points

# A small all-reduce inside a node is one custom kernel that reads the message of every peer. vllm-project/vllm#37756
# measures 7 us for 16 KiB, 11 for 512 KiB and 17 for 1 MiB among 8 B300, #19744 7.2, 14.7 and 22.9 among 4 MI300X. Add
# a kernel launch, as in cost.py.
_KERNEL_PLATFORMS, _KERNEL_SECONDS, KERNEL_BYTES = ("cuda", "rocm"), 10e-6, 2 << 20


@dataclass(frozen=True)
class RankGroup:
    """Describe the devices of a collective.

    ranks: number of devices. inside: number of them in one scale-up domain. apart: distance in device indices between
    neighbors in the domain.
    """

    ranks: int
    inside: int
    apart: int = 1

    @property
    def across(self) -> int:
        """Return the number of scale-up domains that the group spans."""
        return -(-self.ranks // self.inside)


def group_of(axes: tuple[str, ...], sizes: Mapping[str, int], domain: int) -> RankGroup:
    """Return the group of devices along mesh axes.

    Devices fill scale-up domains of `domain` devices in mesh order, with the tensor axis innermost.
    """
    return _group(axes, tuple(sizes.get(axis, 1) for axis in AXES), domain)


@lru_cache(maxsize=4096)
def _group(axes: tuple[str, ...], sizes: tuple[int, ...], domain: int) -> RankGroup:
    places, starts, stride, apart = [0], [0], 1, 0
    for axis, size in zip(reversed(AXES), reversed(sizes), strict=True):
        steps = [stride * step for step in range(size)]
        if axis in axes and size > 1:
            places = [place + step for step in steps for place in places]
            apart = apart or stride
        else:  # first device of every group, modulo the domain
            starts = sorted({(start + step) % domain for step in steps for start in starts})
        stride *= size
    # The group with the fewest devices per domain: all others wait for it.
    inside = min(min(Counter((start + place) // domain for place in places).values()) for start in starts)
    return RankGroup(len(places), inside, apart or 1)


class LinkModel:
    """Estimate the seconds of collectives on one kind of hardware."""

    def __init__(self, hardware: HardwareSpec, *, devices: int) -> None:
        """Prepare estimates for a mesh of `devices` devices; a torus is approximated by a cube."""
        self.hardware = hardware
        self._side = max(2.0, devices ** (1 / hardware.torus_dims))
        self._priced: dict[tuple[CollectiveKind, int, RankGroup], float] = hardware.priced.setdefault(
            ("links", self._side), {}
        )

    def seconds(self, collective: CollectiveOp, group: RankGroup) -> float:
        """Return the seconds of one collective among a group."""
        op: CollectiveKind = "all-to-all" if collective.op == "ragged-all-to-all" else collective.op
        whole = collective.whole_bytes(group.ranks)
        if group.ranks == 1 or not whole:
            return 0.0
        if (price := self._priced.get((op, whole, group))) is None:
            price = self._priced[op, whole, group] = self._price(op, whole, group)
        return price

    def _price(self, op: CollectiveKind, whole: int, group: RankGroup) -> float:
        inside, across = group.inside, group.across
        if across == 1:
            return self._within(op, whole, group)
        if op == "collective-permute":
            return self._far(op, whole, 2)
        if op == "all-to-all":
            near = self._within(op, whole * inside / group.ranks, group) if inside > 1 else 0.0
            return max(near, self._far(op, whole / inside, across, times=inside))
        far = self._far(op, whole / inside, across)  # between devices of the same index in different domains
        if inside == 1:
            return far
        return far + self._within(op, whole, group)  # a reduce-scatter and an all-gather are an all-reduce

    def _far(self, op: CollectiveKind, whole: float, ranks: int, *, times: int = 1) -> float:
        """Return the seconds between domains of `times` messages, while all devices of a domain communicate."""
        if tables := self.hardware.collectives_between_nodes.get(op):
            return self._measured(tables, op, whole * times, ranks)
        steps = 1 if op in ("collective-permute", "all-to-all") else ranks * (2 if op == "all-reduce" else 1)
        return self._out(sent_of(op, whole * times, ranks), steps)

    def _out(self, sent: float, steps: int) -> float:
        """Return the seconds for a device to send bytes to other domains; latency grows with log2(steps)."""
        hardware = self.hardware
        latency = hardware.scale_out_latency_us * 1e-6 * max(1.0, math.log2(steps))
        return latency + sent / hardware.link_bytes_per_s(scale_out=True)

    def _within(self, op: CollectiveKind, whole: float, group: RankGroup) -> float:
        ranks = group.inside
        if op == "all-reduce" and whole <= KERNEL_BYTES and self.hardware.platform in _KERNEL_PLATFORMS:
            return min(self._listed(op, whole, ranks), self._by_a_kernel(whole, ranks))
        return self._listed(op, whole, ranks)

    def _by_a_kernel(self, whole: float, ranks: int) -> float:
        """Return the seconds of a custom all-reduce kernel that reads its peers' memory.

        The result is the faster of one-shot (read all messages) and two-shot (reduce-scatter, then all-gather).
        """
        once = _KERNEL_SECONDS + self._sent_seconds("all-gather", whole * ranks, ranks)
        twice = 2 * (_KERNEL_SECONDS + self._sent_seconds("all-gather", whole, ranks))
        return min(once, twice)

    def _listed(self, op: CollectiveKind, whole: float, ranks: int) -> float:
        if tables := self.hardware.collectives.get(op):
            return self._measured(tables, op, whole, ranks)
        steps = math.log2(ranks) if self.hardware.scale_up == "switch" else ranks / 2
        latency = self.hardware.latency_us * 1e-6 * max(1.0, min(steps, 8.0))
        return latency + self._sent_seconds(op, whole, ranks)

    def _measured(self, tables: Mapping[int, Points], op: CollectiveKind, whole: float, ranks: int) -> float:
        """Interpolate the table of the nearest number of ranks, at equal bytes per device.

        Latency grows with log2(ranks).
        """
        near = min(tables, key=lambda n: (abs(math.log2(n / ranks)), n))
        sent = sent_of(op, whole, ranks) / sent_of(op, 1, near)
        more = tables[near][0][1] * (math.log2(ranks) / math.log2(near) - 1)
        return (_read(tables[near], sent) + max(more, -0.5 * tables[near][0][1])) * 1e-6

    def _sent_seconds(self, op: CollectiveKind, whole: float, ranks: int) -> float:
        """Return the seconds for the bytes that each device sends over the links the group can use."""
        hardware = self.hardware
        rate = hardware.link_bytes_per_s(scale_out=False)
        if hardware.scale_up == "peers":
            rate *= (ranks - 1) / (hardware.scale_up_devices - 1)
        if hardware.scale_up == "torus":
            dims = min(hardware.torus_dims, max(1, math.ceil(math.log(ranks, self._side) - 1e-9)))
            rate *= dims / hardware.torus_dims
            if op == "all-to-all":  # on average a quarter of the ring's hops along each dim
                return whole * max(1.0, min(self._side, ranks) / 4) / rate
        return sent_of(op, whole, ranks) / rate


def _read(points: Points, size: float) -> float:
    """Interpolate the microseconds of a message of `size` bytes."""
    if size <= points[0][0]:
        return points[0][1]
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    at = bisect_left(points, (size, 0.0))
    (low, before), (high, after) = points[at - 1], points[at]
    share = math.log(size / low) / math.log(high / low)
    return math.exp(math.log(before) + share * math.log(after / before))

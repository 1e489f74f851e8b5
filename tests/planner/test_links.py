"""What collectives cost: measured points are given back, and what lies between nodes costs more."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxmoe.parallel.collectives import CollectiveOp, sent_of
from jaxmoe.planner.hardware import hardware_names, read_hardware
from jaxmoe.planner.links import KERNEL_BYTES, LinkModel, RankGroup, group_of

OPS = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


def seconds(name: str, op: str, whole: float, group: RankGroup, *, devices: int = 16) -> float:
    result = int(whole) // (group.ranks if op == "reduce-scatter" else 1)
    return LinkModel(read_hardware(name), devices=devices).seconds(
        CollectiveOp(op=op, axes=(), result_bytes=result), group
    )


@pytest.mark.parametrize(
    ("axes", "sizes", "wanted"),
    [
        (("tensor",), {"tensor": 8, "pipeline": 2}, RankGroup(8, 8, 1)),
        (("pipeline",), {"tensor": 8, "pipeline": 2}, RankGroup(2, 1, 8)),
        (("tensor",), {"tensor": 16}, RankGroup(16, 8, 1)),
        (("expert",), {"expert": 8, "tensor": 2}, RankGroup(8, 4, 2)),
        (("expert", "tensor"), {"expert": 2, "tensor": 8}, RankGroup(16, 8, 1)),
        (("data",), {"data": 4, "expert": 2, "tensor": 2}, RankGroup(4, 2, 4)),
        (("tensor",), {"data": 8}, RankGroup(1, 1, 1)),
        (("tensor",), {"data": 2, "tensor": 6}, RankGroup(6, 2, 1)),  # the second lies on both nodes
        (("expert",), {"pipeline": 2, "expert": 5}, RankGroup(5, 2, 1)),
    ],
)
def test_a_group_is_those_that_differ_along_its_axes(axes, sizes, wanted):
    assert group_of(axes, sizes, 8) == wanted


def test_measured_points_are_given_back():
    hardware = read_hardware("h100")
    for op, tables in hardware.collectives.items():
        for ranks, points in tables.items():
            for size, us in points[:: len(points) - 1]:
                taken = seconds("h100", op, size, RankGroup(ranks, ranks))
                if op == "all-reduce" and size <= KERNEL_BYTES:  # or quicker, by one kernel
                    assert taken <= 1.000001e-6 * us
                else:
                    assert taken == pytest.approx(us * 1e-6, rel=1e-6)


def test_between_points_it_is_piecewise_in_logarithms():
    (low, before), (high, after) = read_hardware("h100").collectives["all-gather"][8][5:7]
    middle = seconds("h100", "all-gather", math.sqrt(low * high), RankGroup(8, 8))
    assert middle == pytest.approx(math.sqrt(before * after) * 1e-6, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "ranks", "kib", "us"),
    [("b300", 8, 16, 7), ("b300", 8, 512, 11), ("b300", 8, 1024, 17), ("mi300x", 4, 2, 7.2), ("mi300x", 4, 1024, 22.9)],
)
def test_small_all_reduces_take_what_one_kernel_takes(name, ranks, kib, us):
    launched = seconds(name, "all-reduce", kib << 10, RankGroup(ranks, ranks))
    assert launched == pytest.approx((us + 3) * 1e-6, rel=0.4)


@pytest.mark.parametrize("name", hardware_names())
@pytest.mark.parametrize("op", OPS)
def test_more_bytes_cost_more_and_other_nodes_more_than_the_own(op, name):
    for ranks in (2, 4, 8):
        near, far = (
            [seconds(name, op, 1 << power, group) for power in range(9, 31)]
            for group in (RankGroup(ranks, ranks), RankGroup(ranks, 1, 8))
        )
        for times in (near, far):  # measured tables are not quite in order
            assert all(0 < less <= 2 * more for less, more in pairwise(times))
            assert times[-1] > 20 * times[0]
        if name != "cpu-8":
            assert all(own < other for own, other in zip(near[16:], far[16:], strict=True))


def test_an_exchange_of_two_nodes_is_bound_by_the_link_between_them():
    hardware, whole = read_hardware("h100"), 1 << 30
    taken = seconds("h100", "all-to-all", whole, RankGroup(16, 8))
    assert taken == pytest.approx(whole / 2 / hardware.link_bytes_per_s(scale_out=True), rel=0.01)


def test_times_measured_between_nodes_are_taken_where_there_are_any():
    hardware = replace(read_hardware("h100"), collectives_between_nodes={"all-gather": {2: ((1024.0, 50.0),)}})
    one = CollectiveOp(op="all-gather", axes=(), result_bytes=1024)
    assert LinkModel(hardware, devices=2).seconds(one, RankGroup(2, 1, 8)) == pytest.approx(50e-6)


def test_the_collective_of_one_device_is_free():
    assert seconds("h100", "all-reduce", 1 << 20, RankGroup(1, 1)) == 0


def test_a_device_sends_what_a_ring_or_an_exchange_needs():
    """Of 96 bytes among 4: three quarters, twice for an all-reduce; all of them to the next stage."""
    assert {op: sent_of(op, 96, 4) for op in OPS} == {
        "all-reduce": 144, "all-gather": 72, "reduce-scatter": 72, "all-to-all": 72, "collective-permute": 96,
    }  # fmt: skip

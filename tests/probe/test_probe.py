"""jaxmoe probe's programs hold what they time, and what they find is hardware that reads back."""

from __future__ import annotations

from typing import get_args

import jax
import numpy as np
import pytest

from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.errors import MeshError
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.planner.hardware import MeasuredOp, read_hardware
from jaxmoe.planner.hardware_file import hardware_text, write_hardware
from jaxmoe.probe import probe as probing
from jaxmoe.probe import timed
from jaxmoe.probe.probe import DeviceRates, ProbePoint, probe

from ..conftest import mesh_of

RESULTS = {  # bytes on a device, of a message of 4,096 over 4 ranks
    "all-reduce": 4096, "all-gather": 4096, "reduce-scatter": 1024, "all-to-all": 4096, "collective-permute": 4096,
}  # fmt: skip
RATES = DeviceRates(tflops={"bf16": 2.0, "f32": 1.0, "int8": 1.5, "fp8": 3.0}, hbm_gbps=100.0)


@pytest.mark.parametrize("axis", ["tensor", "data"])
@pytest.mark.parametrize("op", get_args(MeasuredOp))
def test_a_timed_program_holds_its_collective_as_often_as_it_turns_and_nothing_else(op, axis):
    mesh = mesh_of("data=4,tensor=2" if axis == "data" else "data=2,tensor=4")
    program, argument = timed.collective_program(op, axis, 4096, mesh, 7)
    assert collectives(program.as_text(), mesh) == {CollectiveOp(op=op, axes=(axis,), result_bytes=RESULTS[op]): 7}
    assert timed.differing(program, timed.expected(op, axis, 4096, 4), 7, mesh) == ""
    first = argument.dtype.type(0.5)
    result = np.asarray(program(argument)).reshape(8, -1)  # the first number of each is what the last iteration gave
    grown = op in ("all-reduce", "reduce-scatter")
    np.testing.assert_array_equal(result[:, 0], np.full(8, 4 * first if grown else first))
    np.testing.assert_array_equal(result[:, 1:], first)


def test_a_program_that_times_something_else_is_told_from_it():
    mesh = mesh_of("tensor=8")
    program, _ = timed.collective_program("all-reduce", "tensor", 4096, mesh, 2)
    wanted = timed.expected("all-gather", "tensor", 4096, 8)
    assert timed.differing(program, wanted, 2, mesh) == "2 all-reduce of 4096 bytes"
    assert timed.differing(program, timed.expected("all-reduce", "tensor", 4096, 8), 3, mesh)
    nothing, _ = timed.memory_program(1024, mesh, 2)
    assert timed.differing(nothing, wanted, 2, mesh) == "no collective"


@pytest.mark.parametrize("dtype", timed.DTYPES)
def test_products_are_computed_as_often_as_they_are_counted(dtype):
    mesh = mesh_of("data=2")
    program, argument = timed.product_program(dtype, 16, mesh, 3)
    x = np.asarray(argument, np.float32).reshape(2, 16, 16)
    wanted = x
    for _ in range(3):
        wanted = np.einsum("bij,bjk->bik", wanted, x)
        if dtype == "int8":
            wanted = wanted.astype(np.int32).astype(np.int8).astype(np.float32)
    tolerance = {"bf16": 0.1, "f32": 1e-4, "int8": 0, "fp8": 0.6}[dtype]
    found = np.asarray(program(argument), np.float32).reshape(2, 16, 16)
    assert np.abs(found - wanted).max() <= tolerance
    assert np.abs(found).max() > 0


def test_memory_is_read_and_written_as_often_as_it_is_counted():
    program, argument = timed.memory_program(64, mesh_of("data=2"), 3)
    assert argument.shape == (32,)
    np.testing.assert_array_equal(program(argument), np.full(32, ((0.5 * 0.5 + 1) * 0.5 + 1) * 0.5 + 1))


def test_small_messages_turn_often_and_sizes_are_even_shares():
    assert timed.num_iterations(512) == 256
    assert timed.num_iterations(1 << 30) == 8
    assert timed.message_bytes(512, 6, mesh_of("data=2")) == 528
    assert timed.message_bytes(512, 8, mesh_of("data=2")) == 512


def test_the_median_counts_calls_after_the_first(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(timed.time, "perf_counter", lambda: next(clock))
    taken = []
    assert timed.median_seconds(lambda x: taken.append(x) or x + 1, 0, 3) == 2.0
    assert taken == [0, 1, 2, 3]


@pytest.fixture
def quick(monkeypatch):
    """A probe of the real collectives, two iterations each, with rates at once."""
    monkeypatch.setattr(timed, "num_iterations", lambda num_bytes: 2)
    monkeypatch.setattr(probing, "_rates", lambda *_: RATES)


def test_what_is_probed_reads_back_to_the_same_hardware(quick, tmp_path):
    said = []
    found = probe(max_bytes=2048, repeats=1, name='my "own" cluster', on_progress=said.append)
    assert {(one.op, one.axis, one.ranks, one.num_bytes) for one in found.points} == {
        (op, "tensor", ranks, size) for op in get_args(MeasuredOp) for ranks in (2, 4, 8) for size in (512, 2048)
    }
    assert all(one.span == "inside" and one.us > 0 for one in found.points)
    assert (len(said), found.left_out, found.axes) == (30, (), {"tensor": 8})
    path = tmp_path / "mine.toml"
    text = hardware_text(found.hardware, axes=found.axes, heading=["by a test"], notes=found.notes)
    write_hardware(path, text, found.hardware)
    read = read_hardware(str(path))
    assert read == found.hardware
    assert [file.name for file in tmp_path.iterdir()] == ["mine.toml"]
    assert (read.device, read.platform, read.devices_per_node, read.scale_up_devices) == (
        'my "own" cluster', "cpu", 8, 8,
    )  # fmt: skip
    assert read.bytes_per_s == 100e9
    assert read.tflops == {"bf16": 2, "f32": 1, "fp8": 3}  # int8 is no faster than bf16
    assert read.flops_per_s("int8") == 2e12
    times = {(one.op, one.ranks, one.num_bytes): one.us for one in found.points}
    for op in get_args(MeasuredOp):
        for ranks in (2, 4, 8):
            wanted = ((512, times[op, ranks, 512]), (2048, times[op, ranks, 2048]))
            assert read.collectives[op][ranks] == wanted
    assert read.latency_us == times["collective-permute", 8, 512]
    fastest = max(2048 / times["collective-permute", 8, 2048], 1792 / times["all-gather", 8, 2048]) / 1e3
    assert read.scale_up_gbps == pytest.approx(fastest, rel=1e-3)
    assert "scale_out_gbps" in text
    assert "# not measured: set to the rate inside a node" in text


def test_axes_of_one_length_are_measured_apart_and_the_slower_is_written(quick):
    found = probe(axes={"data": 2, "expert": 2, "tensor": 2}, max_bytes=512, repeats=1)
    assert found.axes == {"data": 2, "expert": 2, "tensor": 2}
    of_permute = {one.axis: one.us for one in found.points if one.op == "collective-permute"}
    assert list(of_permute) == ["tensor", "expert", "data"]
    assert found.hardware.collectives["collective-permute"] == {2: ((512, max(of_permute.values())),)}


def test_links_between_nodes_have_facts_of_their_own(quick, monkeypatch):
    """Devices said to lie on four nodes of two: which groups are measured, and where they are written."""
    monkeypatch.setattr(probing, "fabric_index", lambda device: device.id // 2)
    groups = {
        (axis, mesh.shape[axis]): [
            [device.id for device in group]
            for group in np.moveaxis(mesh.devices, probing.AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
        ]
        for mesh, axis in probing._groups(jax.devices())
    }
    assert groups == {
        ("tensor", 2): [[0, 1], [2, 3], [4, 5], [6, 7]],
        ("data", 2): [[0, 2], [1, 3], [4, 6], [5, 7]],
        ("data", 4): [[0, 2, 4, 6], [1, 3, 5, 7]],
    }
    found = probe(max_bytes=512, repeats=1)
    hardware, us = found.hardware, {(one.op, one.ranks, one.span): one.us for one in found.points}
    assert (hardware.devices_per_node, hardware.scale_up_devices, hardware.nodes) == (2, 2, 4)
    assert {op: list(table) for op, table in hardware.collectives.items()} == {op: [2] for op in get_args(MeasuredOp)}
    assert {op: list(by) for op, by in hardware.collectives_between_nodes.items()} == {
        op: [2, 4] for op in get_args(MeasuredOp)
    }
    assert hardware.scale_out_latency_us == us["collective-permute", 4, "between"]
    assert hardware.latency_us == us["collective-permute", 2, "inside"]
    assert set(found.notes) == {"hbm_gb"}
    spread = {one.span for one in probe(axes={"tensor": 8}, max_bytes=512, repeats=1).points}
    assert spread == {"both"}


def test_nodes_must_hold_as_many_devices_each(monkeypatch):
    monkeypatch.setattr(probing, "fabric_index", lambda device: device.id // 3)
    with pytest.raises(MeshError, match="nodes have 3, 3, 2 devices"):
        probe(max_bytes=512, repeats=1)


def test_one_device_has_no_collectives_and_says_so(quick, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_, first=jax.devices()[:1]: first)
    found = probe(max_bytes=512, repeats=1)
    assert (found.points, dict(found.hardware.collectives)) == ((), {})
    assert found.hardware.scale_up_gbps == RATES.hbm_gbps
    assert set(found.notes) == {"hbm_gb", "scale_up_gbps", "scale_out_gbps"}


def test_what_a_platform_cannot_do_is_left_out_by_name(quick, monkeypatch):
    real = timed.collective_program

    def some(op, *rest):
        if op == "all-to-all":
            raise NotImplementedError("UNIMPLEMENTED: not here\nand a trace")
        return real("all-gather" if op == "all-reduce" else op, *rest)

    monkeypatch.setattr(timed, "collective_program", some)
    found = probe(axes={"tensor": 8}, max_bytes=512, repeats=1)
    assert set(found.hardware.collectives) == {"all-gather", "reduce-scatter", "collective-permute"}
    assert found.left_out == (
        "all-reduce of 512 bytes over 8 ranks: the compiler emits 2 all-gather of 512 bytes instead of 2",
        "all-to-all of 512 bytes over 8 ranks: UNIMPLEMENTED: not here",
    )


def test_rates_grow_products_until_one_takes_its_time(monkeypatch):
    tried = []

    def program(dtype, width, mesh, iterations):
        tried.append((dtype, width))
        if dtype == "fp8":
            raise NotImplementedError("no fp8 here")
        return width, iterations

    seconds = {256: 0.004, 512: 0.02, 1024: 0.2}  # of four products, and of eight passes over memory
    monkeypatch.setattr(timed, "product_program", program)
    monkeypatch.setattr(timed, "memory_program", lambda num_bytes, mesh, iterations: (1024, num_bytes))
    monkeypatch.setattr(timed, "median_seconds", lambda program, argument, repeats: seconds[program])
    left_out: list[str] = []
    rates = probing._rates(32 << 20, 1 << 40, 1, lambda text: None, left_out)
    widths = [width for dtype, width in tried if dtype == "bf16"]
    assert widths == [256, 512, 1024]
    assert rates.tflops["bf16"] == pytest.approx(2 * 512**3 * 4 / 0.02 / 1e12, rel=1e-3)
    assert rates.hbm_gbps == pytest.approx(2 * 8 * (32 << 20) / 0.2 / 1e9, rel=1e-3)
    assert left_out == ["fp8 matmuls of width 256: no fp8 here"]


def test_rates_are_measured_on_all_devices(monkeypatch):
    monkeypatch.setattr(probing, "_WIDTHS", (16, 16))
    left_out: list[str] = []
    rates = probing._rates(512, 1 << 30, 1, lambda text: None, left_out)
    assert (set(rates.tflops), left_out) == ({"bf16", "f32", "int8", "fp8"}, [])
    assert min(*rates.tflops.values(), rates.hbm_gbps) > 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_bytes": 511}, r"largest message 511 bytes must lie in \[512, "),
        ({"max_bytes": 1 << 60}, "a program holds up to 6 of them in"),
        ({"axes": {"tensor": 9}}, "needs 9 devices and there are 8"),
        ({"axes": {"model": 8}}, "unknown mesh axis 'model'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_measured(asked, said):
    with pytest.raises(MeshError, match=said):
        probe(repeats=1, **({"max_bytes": 512} | asked))


def test_the_rate_of_a_link_is_of_the_widest_groups_largest_message():
    def point(op, ranks, num_bytes, us, span="inside"):
        return ProbePoint(op=op, axis="tensor", ranks=ranks, span=span, num_bytes=num_bytes, us=us)

    points = [
        point("collective-permute", 2, 1000, 0.1), point("collective-permute", 4, 512, 3.0),
        point("collective-permute", 4, 4000, 4.0), point("all-gather", 4, 512, 1.0),
        point("all-gather", 4, 4000, 2.0), point("all-reduce", 4, 4000, 0.1),
    ]  # fmt: skip
    assert probing._link(points, "inside") == (1.5, 3.0)
    assert probing._link(points, "between") is None

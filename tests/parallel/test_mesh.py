from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxmoe.errors import MeshError
from jaxmoe.parallel.mesh import (
    AXES,
    PlannedMesh,
    arranged,
    build_mesh,
    check_processes,
    compiler_options,
    conform_mesh,
    default_axes,
    emulate_devices,
    hosts_of,
    in_rings,
    nearest_devices,
    parse_mesh,
    preset_names,
)
from jaxmoe.parallel.sharding import MeshPlacement


def test_axes_left_out_are_one_and_tensor_is_innermost():
    assert parse_mesh("tensor=2,expert=4") == {"data": 1, "pipeline": 1, "expert": 4, "tensor": 2}
    assert AXES[-1] == "tensor"
    mesh = build_mesh(parse_mesh("data=2,tensor=2,expert=2"))
    ids = [device.id for device in mesh.devices[0, 0, 0]]
    assert ids[1] == ids[0] + 1
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensor=0", "tensor=0"), ("tensor=-1", "tensor=-1"), ("tensor=two", "tensor=two"), ("model=2", "'model'"),
        ("tensor=2,tensor=2", "twice"), ("no-such-preset", "presets: a100, b200"),
        ("tensor=²", "tensor=²"), ("tensor=2,", "axis=size"),
    ],
)  # fmt: skip
def test_bad_meshes_name_what_is_wrong(text, said):
    with pytest.raises(MeshError, match=said.replace("(", r"\(")):
        parse_mesh(text)


def test_every_preset_reads_and_is_named_for_hardware():
    assert {"cpu-8", "h200-8", "b200-2x8", "v5p-64"} <= set(preset_names())
    assert all(set(parse_mesh(name)) == set(AXES) for name in preset_names())


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(MeshError, match=r"needs 12 devices and there are 8.*--devices 12"):
        build_mesh(parse_mesh("data=2,tensor=6"))


def test_a_mesh_of_fewer_devices_takes_the_first_and_says_so(caplog):
    mesh = build_mesh(parse_mesh("data=2,tensor=3"))
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3, 4, 5]
    (said,) = caplog.messages
    assert "data=2 x pipeline=1 x expert=1 x tensor=3 takes 6 of 8 cpu devices (0, 1, 2, 3, 4, 5)" in said
    build_mesh(parse_mesh("data=8"))
    assert len(caplog.messages) == 1


def torus(*extents: int, cores: int = 1) -> list[SimpleNamespace]:
    """Chips of a slice in JAX's order, the first coordinate changing fastest, their cores beside each other."""
    places = [place[::-1] for place in np.ndindex(*extents[::-1])]
    return [
        SimpleNamespace(id=number * cores + core, coords=place, core_on_chip=core, process_index=0, platform="tpu")
        for number, place in enumerate(places) for core in range(cores)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "count", "corners"),
    [
        (torus(4, 4, 1), 4, [(0, 0, 0), (1, 1, 0)]), (torus(2, 4, 1), 4, [(0, 0, 0), (1, 1, 0)]),
        (torus(4, 4, 4), 8, [(0, 0, 0), (1, 1, 1)]), (torus(4, 4, 1), 3, [(0, 0, 0), (0, 2, 0)]),
        (torus(2, 2, 1, cores=2), 4, [(0, 0, 0), (0, 1, 0)]), (torus(4, 4, 1)[1:], 4, [(0, 1, 0), (1, 2, 0)]),
    ],
)  # fmt: skip
def test_of_a_torus_a_full_box_is_taken(devices, count, corners):
    chosen = nearest_devices(devices, count)
    assert len(chosen) == count
    assert [
        tuple(edge(at) for at in zip(*(one.coords for one in chosen), strict=True)) for edge in (min, max)
    ] == corners
    assert chosen == [one for one in devices if one in chosen]


def test_where_no_box_has_so_many_the_first_are_taken():
    assert [one.id for one in nearest_devices(torus(2, 2, 1), 3)] == [0, 1, 2]


def test_a_mesh_leaves_no_process_without_devices():
    devices = [SimpleNamespace(id=at, process_index=at // 4, platform="cpu") for at in range(8)]
    with pytest.raises(MeshError, match="takes 4 of 8 devices and leaves process 1 without any"):
        build_mesh({"tensor": 4}, devices)


def of_processes(processes: int, each: int, *, platform: str = "cpu", **changes) -> list[SimpleNamespace]:
    """Devices of several processes in an order that nobody wants: the last first, ids with gaps between processes."""
    return [
        SimpleNamespace(id=2048 * process + at, process_index=process, platform=platform, **changes)
        for process in range(processes) for at in range(each)
    ][::-1]  # fmt: skip


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("processes", "each", "axes", "spanned"),
    [
        (2, 4, "data=2,tensor=4", {"data": 2, "tensor": 1}), (2, 4, "tensor=4,expert=2", {"expert": 2, "tensor": 1}),
        (2, 4, "data=2,expert=2,tensor=2", {"data": 2, "expert": 1, "tensor": 1}),
        (2, 4, "pipeline=2,expert=2,tensor=2", {"pipeline": 2, "expert": 1, "tensor": 1}),
        (4, 2, "data=2,expert=2,tensor=2", {"data": 2, "expert": 2, "tensor": 1}),
        (4, 2, "data=2,tensor=4", {"data": 2, "tensor": 2}), (4, 2, "tensor=8", {"tensor": 4}),
        (4, 2, "data=2,pipeline=2,expert=2", {"data": 2, "pipeline": 2, "expert": 1}),
    ],
)  # fmt: skip
def test_devices_fill_a_mesh_process_by_process(platform, processes, each, axes, spanned):
    """Tensor groups leave a process last: how many processes the groups along each axis have devices of."""
    shape = tuple(parse_mesh(axes).values())
    placed = arranged(of_processes(processes, each, platform=platform), shape)
    assert [(device.process_index, device.id % 2048) for device in placed.flat] == [
        (process, at) for process in range(processes) for at in range(each)
    ]
    hosts = hosts_of(SimpleNamespace(devices=placed))
    assert hosts.shape == shape
    for axis, wanted in spanned.items():
        groups = np.moveaxis(hosts, AXES.index(axis), -1).reshape(-1, shape[AXES.index(axis)])
        assert {len(set(group)) for group in groups.tolist()} == {wanted}


def test_gpus_of_a_node_are_one_host_whatever_their_processes():
    """As JAX reports by slice_index; here one process a GPU, and processes of two nodes take turns."""
    devices = [
        SimpleNamespace(id=at, process_index=at, platform="gpu", slice_index=at % 2) for at in range(8)
    ]  # fmt: skip
    placed = arranged(devices, (2, 1, 1, 4))
    assert [[device.id for device in group] for group in placed.reshape(2, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert hosts_of(SimpleNamespace(devices=placed)).reshape(2, 4).tolist() == [[0] * 4, [1] * 4]
    for device in devices:
        device.platform = "cpu"
    assert len(set(hosts_of(SimpleNamespace(devices=placed)).flat)) == 8


def test_the_first_devices_of_processes_are_taken_in_order():
    assert [one.id for one in nearest_devices(of_processes(2, 4), 6)] == [0, 1, 2, 3, 2048, 2049]


def test_devices_of_several_slices_make_no_mesh():
    devices = torus(2, 2, 1)
    for device in devices:
        device.slice_index = device.id // 2
    with pytest.raises(MeshError, match="the 4 devices are of 2 TPU slices"):
        arranged(devices, (1, 1, 1, 4))


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("cpu", "needs 12 devices and 2 processes have 8; on CPU emulate them with --devices 6 in each process"),
        ("gpu", "needs 12 devices and 2 processes have 8$"),
    ],
)
def test_a_mesh_of_more_devices_than_processes_have_is_refused(platform, words):
    with pytest.raises(MeshError, match=words):
        build_mesh({"tensor": 12}, of_processes(2, 4, platform=platform))


def test_a_mesh_of_ones_own_has_devices_of_every_process(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: of_processes(3, 2))
    mine = [device for device in of_processes(3, 2) if device.process_index != 1]
    mesh = SimpleNamespace(devices=np.array(mine), size=4)
    with pytest.raises(MeshError, match="the Mesh of 4 devices leaves process 1 without any"):
        check_processes(mesh)
    whole = SimpleNamespace(devices=np.array(of_processes(3, 2)), size=6)
    assert check_processes(whole) is whole


def test_one_process_alone_says_which_devices_it_takes(monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    build_mesh(parse_mesh("data=2,tensor=3"))
    assert caplog.messages == []


def test_a_mesh_of_ones_own_keeps_every_device_at_its_coordinates():
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = MeshPlacement(mesh=jax.sharding.Mesh(devices, ("tensor", "data"))).mesh
    assert (mesh.axis_names, dict(mesh.shape)) == (AXES, {"data": 2, "pipeline": 1, "expert": 1, "tensor": 4})
    assert [[device.id for device in group] for group in mesh.devices.reshape(2, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert MeshPlacement(mesh=mesh).mesh is mesh


def test_a_mesh_of_ones_own_may_hold_some_axes_and_devices_in_any_order():
    devices = np.array(jax.devices())
    explicit = jax.sharding.Mesh(devices[[5, 2]], ("expert",), axis_types=(jax.sharding.AxisType.Explicit,))
    mesh = conform_mesh(explicit)
    assert dict(mesh.shape) == {"data": 1, "pipeline": 1, "expert": 2, "tensor": 1}
    assert [device.id for device in mesh.devices.flat] == [5, 2]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    three = conform_mesh(jax.sharding.Mesh(devices.reshape(2, 2, 2), ("tensor", "pipeline", "data")))
    assert [device.id for device in three.devices[:, 0, 0, 1]] == [4, 5]
    with pytest.raises(MeshError, match="unknown mesh axis 'model'"):
        conform_mesh(jax.sharding.Mesh(devices, ("model",)))
    assert conform_mesh(jax.sharding.Mesh(devices[3], ())).devices.flat[0].id == 3
    with pytest.raises(MeshError, match="no devices"):
        conform_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def test_defaults_put_whole_experts_on_devices():
    assert default_axes(8, num_experts=64)["expert"] == 8
    assert default_axes(8, num_experts=4)["tensor"] == 8
    assert default_axes(8, num_experts=0)["tensor"] == 8


def test_devices_cannot_change_once_started(monkeypatch):
    emulate_devices(8)
    with pytest.raises(MeshError, match="devices=4"):
        emulate_devices(4)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    with pytest.raises(MeshError, match="XLA_FLAGS already sets 4"):
        emulate_devices(8)
    with pytest.raises(MeshError, match="devices=0"):
        emulate_devices(0)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_one_kind_of_device_alone_needs_options_of_its_compiler(kind):
    mesh = SimpleNamespace(devices=np.array([[SimpleNamespace(device_kind=kind)]]))
    assert (compiler_options(mesh) is not None) == (kind == "TPU7x")


def test_a_planned_mesh_places_as_one_of_devices_does():
    axes = parse_mesh("data=2,tensor=2,expert=2")
    real, planned = MeshPlacement(mesh=build_mesh(axes)), MeshPlacement(mesh=PlannedMesh(axes, "cpu"))
    assert planned.platform == real.platform == "cpu"
    assert (planned.mesh.shape, planned.mesh.size, planned.mesh.devices.shape) == (axes, 8, (2, 1, 2, 2))
    described, there = (placement.sharding("moe_expert", "width", "moe_ffn") for placement in (planned, real))
    assert described.spec == there.spec
    assert described.shard_shape((8, 6, 4)) == there.shard_shape((8, 6, 4)) == (4, 6, 2)


def test_a_planned_mesh_is_of_more_devices_than_there_are():
    assert MeshPlacement(mesh=PlannedMesh({"expert": 128})).sharding("moe_expert").shard_shape((256,)) == (2,)
    with pytest.raises(MeshError, match="unknown mesh axis 'rows'"):
        PlannedMesh({"rows": 2})


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4, 2), (4, 4)])
def test_devices_of_a_square_stand_along_its_edge(shape):
    """Along an axis of four each has a link to the next one, over a square that was in rows."""
    squares = np.array([(x, y) for x in range(2) for y in range(2)])
    coords = [[(*squares[at], *squares[other]) for at in range(shape[1])] for other in range(shape[0])]
    devices = np.empty(shape, object)
    for at in np.ndindex(shape):
        devices[at] = SimpleNamespace(coords=coords[at[0]][at[1]])
    found = in_rings(devices)
    assert sorted(device.coords for device in found.flat) == sorted(device.coords for device in devices.flat)
    for axis in [at for at, size in enumerate(shape) if size == 4]:
        places = np.array([device.coords for device in found.flat]).reshape(*shape, -1)
        assert (abs(places - np.roll(places, 1, axis)).sum(-1) == 1).all()


def test_devices_of_a_line_and_those_without_places_stay_as_they_are():
    line = np.array([SimpleNamespace(coords=(at, 0)) for at in range(4)])
    for devices in (line, np.arange(4)):
        assert (in_rings(devices) == devices).all()

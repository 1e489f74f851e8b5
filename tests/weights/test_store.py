"""The Orbax side: what is written is what Orbax itself would write and restores, on any mesh; reads are exact."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.dtypes import DTYPES, TensorSpec
from jaxmoe.weights.safetensors_file import read_header
from jaxmoe.weights.store import (
    CHECKPOINT,
    TREE,
    ZARRAY,
    ChunkGrid,
    array_metadata,
    checkpoint_metadata,
    choose_chunk,
    tree_metadata,
)  # fmt: skip
from jaxmoe.weights.verify import problems

from ..conftest import mesh_of
from .hf_checkpoints import every_dtype, random_tensor, write_checkpoint_dir

NO_64_BITS = ("F64", "I64", "U64")  # JAX narrows them unless told not to


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return every_dtype(tmp_path_factory.mktemp("store") / "source")


@pytest.fixture(scope="module")
def store(source) -> Path:
    convert(source, source.parent / "orbax")
    return source.parent / "orbax"


def _arrays(source: Path) -> dict[str, np.ndarray]:
    """The published tensors, in their own dtypes, by the format's description."""
    infos, content = read_header(source / "model.safetensors"), (source / "model.safetensors").read_bytes()
    return {
        name: np.frombuffer(content[info.start : info.start + info.num_bytes], DTYPES[info.dtype_name].numpy).reshape(
            info.shape
        )
        for name, info in infos.items()
    }


def _assert_same(restored: dict, expected: dict[str, np.ndarray]) -> None:
    assert set(restored) == set(expected)
    for name, array in expected.items():
        found = np.asarray(restored[name])
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("checkpointer", [ocp.PyTreeCheckpointer, ocp.StandardCheckpointer])
def test_orbax_restores_every_dtype(checkpointer, source, store):
    with checkpointer() as opened:
        _assert_same(opened.restore(store), _arrays(source))


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,expert=4", "data=1"])
def test_orbax_restores_onto_any_mesh(mesh, source, tmp_path):
    """Whatever the mesh that it was written for."""
    convert(source, tmp_path / "orbax", mesh="expert=4")
    expected, devices = _arrays(source), mesh_of(mesh)
    split = NamedSharding(devices, PartitionSpec(None, devices.axis_names))
    whole = NamedSharding(devices, PartitionSpec())
    target = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split if array.shape[1:] == (8,) else whole)
        for name, array in expected.items()
        if not name.endswith(NO_64_BITS)
    }
    with ocp.PyTreeCheckpointer() as opened:
        args = ocp.checkpoint_utils.construct_restore_args(target)
        found = opened.restore(
            tmp_path / "orbax", args=ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
        )
    for name, array in found.items():
        assert array.sharding == target[name].sharding
    _assert_same(found, {name: expected[name] for name in target})


def test_metadata_is_what_orbax_writes(tmp_path):
    """Orbax's own, for the same tree: all of it but times, and chunks that are not compressed."""
    tree = {f"of.{name}": np.zeros((3, 4), dtype.numpy) for name, dtype in DTYPES.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as opened:
        opened.save(tmp_path / "own", tree)

    def own(name: str) -> dict:
        return json.loads((tmp_path / "own" / name).read_bytes())

    assert json.loads(tree_metadata(tree)) == own(TREE)
    times = dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"))
    assert json.loads(checkpoint_metadata()) == own(CHECKPOINT) | times
    for name in DTYPES:
        spec = TensorSpec(name=f"of.{name}", dtype=name, shape=(3, 4))
        assert json.loads(array_metadata(spec, (3, 4))) == own(f"of.{name}/{ZARRAY}") | {"compressor": None}


@pytest.mark.parametrize("shape", [(10, 6), (7,), (), (1, 40), (3, 5, 4), (2, 3, 1, 8), (17, 1), (0, 3)])
@pytest.mark.parametrize("limit", [4, 16, 40, 1 << 20])
@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_chunks_cover_a_tensor_once(shape, limit, num_shares, monkeypatch):
    monkeypatch.setattr("jaxmoe.weights.store._MIN_CHUNK_BYTES", 8)
    spec = TensorSpec(name="x", dtype="F32", shape=shape)
    grid = ChunkGrid(shape=shape, chunk=choose_chunk(spec, num_shares, limit), itemsize=4)
    assert grid.chunk_bytes <= limit or 0 in shape
    values = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    found = np.full(shape, -1, np.int32)
    for run in grid.files():  # by zarr's own meaning of a chunk's name
        index = [int(place) for place in run.file.split(".")][: len(shape)]
        window = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, grid.chunk, strict=True))
        assert (found[window] == -1).all()
        found[window] = values[window]
        at = next(r for r in grid.runs(4 * int(values[window].flat[0]), spec.num_bytes))
        assert (at.file, at.start) == (run.file, 0)
        assert run.num_bytes == values[window].nbytes
    np.testing.assert_array_equal(found, values)


def test_a_share_of_a_mesh_is_whole_chunks():
    spec = TensorSpec(name="x", dtype="BF16", shape=(4096, 14336))
    for num_shares in (1, 2, 8, 16):
        rows = choose_chunk(spec, num_shares)[0]
        assert (4096 // num_shares) % rows == 0
        assert rows * 14336 * 2 <= 32 << 20
    assert choose_chunk(TensorSpec(name="x", dtype="BF16", shape=(64, 64)), 8) == (64, 64)  # too little to cut
    assert choose_chunk(TensorSpec(name="x", dtype="BF16", shape=(9973, 8192)), 8)[0] == 1995  # a prime: five chunks
    assert choose_chunk(TensorSpec(name="x", dtype="U8", shape=(10007, 204393)))[0] * 204393 <= 32 << 20


def test_rows_are_read_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.weights.store.CHUNK_BYTES", 64)
    rng = np.random.default_rng(0)
    tensors = {"tall": random_tensor(rng, "BF16", 23, 5), "wide": random_tensor(rng, "BF16", 3, 101)}
    source = write_checkpoint_dir(tmp_path / "source", tensors)
    chunks = {
        name: choose_chunk(TensorSpec(name=name, dtype=t[0], shape=t[1]), limit=64) for name, t in tensors.items()
    }
    assert chunks == {"tall": (6, 5), "wide": (1, 26)}
    monkeypatch.setattr("jaxmoe.weights.store.choose_chunk", lambda spec, num_shares: chunks[spec.name])
    convert(source, tmp_path / "orbax")
    stored = open_tensors(tmp_path / "orbax")
    for name, (_, shape, content) in tensors.items():
        expected = np.frombuffer(content, ml_dtypes.bfloat16).reshape(shape).view(np.uint16)
        for low in range(shape[0]):
            for high in range(low, shape[0] + 1):
                np.testing.assert_array_equal(stored[name].read_rows(low, high).view(np.uint16), expected[low:high])


def test_an_orbax_checkpoint_of_another_writer_is_refused(tmp_path):
    with ocp.PyTreeCheckpointer() as opened:
        opened.save(tmp_path / "other", {"a": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"Orbax checkpoint without jaxmoe_manifest.json"):
        open_tensors(tmp_path / "other")


@pytest.mark.parametrize("name", ["x/0.0", f"x/{ZARRAY}", "x"])
def test_links_out_of_an_orbax_checkpoint_are_refused(name, tmp_path):
    tensors = {"x": random_tensor(np.random.default_rng(0), "F32", 3, 4)}
    convert(write_checkpoint_dir(tmp_path / "source", tensors), tmp_path / "orbax")
    path = tmp_path / "orbax" / name
    path.rename(tmp_path / "outside")
    path.symlink_to("../outside" if name == "x" else "../../outside")
    words = f"orbax/{name} is a link that leaves the directory, to {tmp_path}/outside"
    with pytest.raises(CheckpointError, match=words):
        open_tensors(tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "orbax", tmp_path / "hf")
    assert words in problems(tmp_path / "orbax")[0]
    assert not (tmp_path / "hf.partial").exists()


def test_chunks_that_cut_two_dims_are_refused():
    with pytest.raises(CheckpointError, match=r"\[2, 2\] cut \[4, 4\] along more than one dim"):
        ChunkGrid(shape=(4, 4), chunk=(2, 2), itemsize=4)

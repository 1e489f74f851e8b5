"""A checkpoint directory: single file or index, JSON files, and everything that may be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmoe import CheckpointError
from jaxmoe.weights.checkpoint import open_tensors, read_json

FILES = ("model-1.safetensors", "model-2.safetensors")


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Tensors a and b in one file, c in another, an index beside them."""
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, tmp_path / FILES[0])
    save_file({"c": np.ones(4, np.float32)}, tmp_path / FILES[1])
    return _index(tmp_path, {"a": FILES[0], "b": FILES[0], "c": FILES[1]})


def _index(directory: Path, weight_map: object) -> Path:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_all_files_of_an_index_are_opened(sharded):
    assert {name: info.shape for name, info in open_tensors(sharded).items()} == {"a": (2,), "b": (3,), "c": (4,)}


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path)) == ["a"]


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1 weight files: model.safetensors"):
        open_tensors(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / FILES[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of 2 weight files: {FILES[1]}"):
        open_tensors(sharded)


def test_tensors_the_index_promises_and_the_files_lack(sharded):
    _index(sharded, {"a": FILES[0], "gone": FILES[1], "away": FILES[1]})
    with pytest.raises(CheckpointError, match="names 2 tensors that the files lack: away, gone"):
        open_tensors(sharded)


def test_a_tensor_in_two_files(sharded):
    save_file({"a": np.ones(2, np.float32)}, sharded / FILES[1])
    with pytest.raises(CheckpointError, match=f"tensor 'a' is in both {FILES[0]} and {FILES[1]}"):
        open_tensors(sharded)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_may_not_lead_outside_its_directory(sharded, outside):
    with pytest.raises(CheckpointError, match=f"names files outside its directory: .*{outside}"):
        open_tensors(_index(sharded, {"a": outside}))


@pytest.mark.parametrize("name", ["", ".", "..", "null\0byte"])
def test_an_index_that_names_no_file(sharded, name):
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1 weight files|outside its directory"):
        open_tensors(_index(sharded, {"a": name}))


def test_names_too_long_for_a_file(sharded):
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1 weight files: x{80}$"):
        open_tensors(_index(sharded, {"a": "x" * 5000}))


def test_tensors_that_an_index_leaves_out(sharded):
    with pytest.raises(CheckpointError, match=r"omits 1 tensors of its files: b; fetch both again"):
        open_tensors(_index(sharded, {"a": FILES[0], "c": FILES[1]}))


def test_tensors_that_an_index_looks_for_elsewhere(sharded):
    with pytest.raises(
        CheckpointError, match=f"wrong files for 1 tensors: 'b' is not in {FILES[1]}, but in {FILES[0]}"
    ):
        open_tensors(_index(sharded, {"a": FILES[0], "b": FILES[1], "c": FILES[1]}))


def test_an_index_and_a_single_file_that_it_does_not_name(sharded):
    save_file({"a": np.ones(2, np.float32)}, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model.safetensors and model.safetensors.index.json.*remove"):
        open_tensors(sharded)
    for name in FILES:
        (sharded / name).unlink()
    assert list(open_tensors(_index(sharded, {"a": "model.safetensors"}))) == ["a"]


def test_no_tensors(sharded):
    with pytest.raises(CheckpointError, match="holds no tensors: fetch it again"):
        open_tensors(_index(sharded, {}))


@pytest.mark.parametrize("name", [FILES[1], "model.safetensors.index.json"])
def test_links_that_leave_the_directory(sharded, name):
    """Those to the blobs of a hub's cache may, those to anywhere else may not."""
    snapshot = sharded / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (sharded / "models--org--name" / "blobs").mkdir()
    for path in [path for path in sharded.iterdir() if path.is_file()]:
        path.rename(sharded / "models--org--name" / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(open_tensors(snapshot)) == {"a", "b", "c"}
    (snapshot / name).unlink()
    (sharded / "models--org--name" / "blobs" / name).rename(sharded / name)
    (snapshot / name).symlink_to(sharded / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leaves the directory, to {sharded / name}"):
        open_tensors(snapshot)


@pytest.mark.parametrize("weight_map", [None, [], "a", 5, {"a": 5}, {"a": None}, {"a": ["x"]}])
def test_an_index_without_a_weight_map(sharded, weight_map):
    with pytest.raises(CheckpointError, match="has no weight_map of tensor names to file names"):
        open_tensors(_index(sharded, weight_map))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"{" * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{'a': 1}"],
    ids=["empty", "open", "bytes", "braces", "brackets", "digits", "quotes"],
)
def test_json_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json is not readable JSON") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("5", "int"), ('"a"', "str"), ("null", "NoneType")])
def test_json_that_is_no_object(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json holds a JSON {kind}"):
        read_json(tmp_path / "config.json")


def test_a_missing_json_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json: give a Hugging Face checkpoint directory"):
        read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "generation_config.json", required=False) == {}

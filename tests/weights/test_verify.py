"""What was written is held against its checksums: a byte flipped anywhere is reported by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.errors import CheckpointError
from jaxmoe.weights import shards
from jaxmoe.weights.checkpoint import INDEX, open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.manifest import CHAT_TEMPLATES, MANIFEST, read_manifest
from jaxmoe.weights.safetensors_file import read_header
from jaxmoe.weights.verify import problems

from ..conftest import mesh_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.quantized import write_quantized
from .hf_checkpoints import TensorBytes, bytes_of, every_dtype, random_tensor, write_checkpoint_dir, write_file

CASE = "mixtral_window"


@pytest.fixture
def source(tmp_path) -> Path:
    return every_dtype(tmp_path / "source")


def _flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_flipped_byte_anywhere_is_reported(to, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.ShardSink.__init__, "__defaults__", (150,))
    monkeypatch.setattr("jaxmoe.weights.store.choose_chunk.__defaults__", (1, 48))
    rng = np.random.default_rng(0)
    shapes = {"a.weight": ("F32", 5, 8), "b.weight": ("F8_E4M3", 7, 9), "c": ("BF16",), "d": ("U8", 3)}
    tensors = {name: random_tensor(rng, *shape) for name, shape in shapes.items()}
    whole = tmp_path / "out"
    convert(write_checkpoint_dir(tmp_path / "source", tensors), whole, to=to)
    assert problems(whole) == []
    headers = {name: entry.head_bytes for name, entry in read_manifest(whole).files.items()}
    infos, flips = open_tensors(whole), 0
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), str(path.relative_to(whole))
        for place in {0, len(content) // 2, len(content) - 1, *rng.integers(0, len(content), 2).tolist()}:
            path.write_bytes(_flipped(content, place, int(rng.integers(8))))
            flips += 1
            if name == MANIFEST:
                with pytest.raises(CheckpointError, match=MANIFEST):
                    problems(whole)
                continue
            if to == "hf" and name.endswith(".safetensors") and place >= headers[name]:
                here = (t for t, i in infos.items() if i.path == path and i.start <= place < i.start + i.num_bytes)
                expected = repr(next(here))
            else:
                is_alone = path.parent == whole or path.parent.name == CHAT_TEMPLATES
                expected = name if is_alone else repr(path.parent.name)
            assert expected in " ".join(problems(whole))
        path.write_bytes(content)
    assert problems(whole) == []
    assert flips > 30


def test_every_byte_of_a_manifest_counts(tmp_path):
    rng = np.random.default_rng(0)
    convert(write_checkpoint_dir(tmp_path / "source", {"a": random_tensor(rng, "F32", 4)}), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(_flipped(content, place, 0))
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(tmp_path / "out")


def _of_dtype_f16(tensors: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    return {name: ("F16" if dtype == "BF16" else dtype, *rest) for name, (dtype, *rest) in tensors.items()}


def _renamed(tensors: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    return {"other" if name == "scalar" else name: tensor for name, tensor in tensors.items()}


def _turned(tensors: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    return {name: (dtype, shape[::-1], content) for name, (dtype, shape, content) in tensors.items()}


def _replaced(tensors: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    return {"q": ("F32", (1,), b"abcd")}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_of_dtype_f16, "1 tensors .*: of.BF16"), (_renamed, "2 tensors .*: other, scalar"),
        (_turned, "18 tensors .*: cube, empty, "), (_replaced, "20 tensors .* and 12 more"),
    ],
)  # fmt: skip
def test_headers_that_are_not_as_written_are_no_source(change, names, source, tmp_path):
    """Of the same bytes of numbers, which no checksum of theirs tells apart."""
    whole = tmp_path / "hf"
    convert(source, whole, to="hf")
    write_file(whole / "model.safetensors", change(bytes_of(whole)))
    words = f"has headers of {names}"
    for read in (open_tensors, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=words):
            read(whole)
    with pytest.raises(CheckpointError, match=words):
        convert(whole, tmp_path / "out", weights_dtype="float32")
    assert re.search(words, " ".join(problems(whole)))
    assert not (tmp_path / "out").exists()


def _one_byte_longer(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes() + b"x")


@pytest.mark.parametrize("change", [Path.unlink, _one_byte_longer])
def test_chunks_that_went_or_grew_are_said_before_anything_is_written(change, source, tmp_path):
    convert(source, tmp_path / "orbax")
    change(tmp_path / "orbax" / "of.F32" / "0.0")
    with pytest.raises(CheckpointError, match=r"missing chunks, or .* of a wrong size, in 1 tensors: of.F32; convert"):
        convert(tmp_path / "orbax", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["orbax", "source"]


def test_files_that_went_or_grew_are_reported(source, tmp_path):
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "of.F32" / "0.0").unlink()
    (tmp_path / "out" / "tokenizer.json").unlink()
    with (tmp_path / "out" / "of.U8" / "0.0").open("ab") as file:
        file.write(b"x")
    said = problems(tmp_path / "out")
    assert len(said) == 3
    assert all(
        any(words in line for line in said) for words in ("'of.F32'", "tokenizer.json", "57 bytes instead of 56")
    )


def _negated(source: Path, directory: Path) -> Path:
    """The tensors of the only file of a checkpoint, all bits turned over."""
    infos, content = read_header(source), source.read_bytes()
    tensors = {
        name: (
            info.dtype_name,
            info.shape,
            bytes(255 - one for one in content[info.start : info.start + info.num_bytes]),
        )
        for name, info in infos.items()
    }
    write_file(directory, tensors)
    return directory


@pytest.mark.parametrize("limit", [700, 10**9], ids=["shards", "one file"])
def test_weights_that_were_not_written_are_reported_and_not_read(limit, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.ShardSink.__init__, "__defaults__", (limit,))
    whole = tmp_path / "out"
    convert(source, whole, to="hf")
    expected = bytes_of(source)
    _negated(source / "model.safetensors", whole / "other.safetensors")
    index = {"weight_map": dict.fromkeys(expected, "other.safetensors")}
    (whole / "other.index.json").write_text(json.dumps(index))
    strays = ["other.index.json", "other.safetensors"]
    if limit > 700:
        (whole / INDEX).write_text(json.dumps(index))
        strays.insert(0, INDEX)
    assert bytes_of(whole) == expected
    assert problems(whole) == [f"file {name} is not in the manifest: remove it" for name in strays]
    assert "other.safetensors" in convert(whole, tmp_path / "orbax").left_behind


def test_a_stray_file_beside_an_orbax_checkpoint_is_reported(source, tmp_path):
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert problems(tmp_path / "out") == ["file model.safetensors is not in the manifest: remove it"]


def _reversed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16", "int8", "fp8-block"])
def test_a_corrupt_source_is_not_cast_or_quantized(weights_dtype, tiny_dir, tmp_path):
    convert(tiny_dir(CASE), tmp_path / "orbax")
    name = "model.layers.0.self_attn.q_proj.weight"
    _reversed(tmp_path / "orbax" / name / "0.0")
    with pytest.raises(CheckpointError, match=f"tensor '{name}' of the source differs from its checksum"):
        convert(tmp_path / "orbax", tmp_path / "out", weights_dtype=weights_dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["", "_scale_inv"])
def test_a_corrupt_source_is_not_dequantized(end, tmp_path):
    write_quantized(CASES_BY_NAME["deepseek_v3_halves"], "fp8", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "orbax")
    name = f"model.layers.0.mlp.up_proj.weight{end}"
    chunk = tmp_path / "orbax" / name / "0.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=f"tensor '{name}' of the source differs from its checksum"):
        convert(tmp_path / "orbax", tmp_path / "out", weights_dtype="bfloat16")


def test_a_corrupt_source_is_not_carried_on(source, tmp_path, tiny_dir):
    convert(source, tmp_path / "orbax")
    chunk = tmp_path / "orbax" / "of.BF16" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"tensor 'of.BF16' of the source differs from its checksum"):
        convert(tmp_path / "orbax", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    convert(tiny_dir(CASE), tmp_path / "tiny")
    name = "model.layers.0.self_attn.q_proj.weight"
    chunk = tmp_path / "tiny" / name / "0.0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' differs from its checksum"):
        LLM.load(tmp_path / "tiny", mesh=mesh_of("data=1"), verify=True)

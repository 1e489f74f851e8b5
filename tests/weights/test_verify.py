"""What was written is held against its checksums: a byte flipped anywhere is reported by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.errors import CheckpointError
from jaxmoe.weights import shards
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.manifest import MANIFEST, read_manifest
from jaxmoe.weights.verify import problems

from ..conftest import mesh_of
from .published import every_dtype, random_tensor, write_published

CASE = "mixtral_window"


@pytest.fixture
def source(tmp_path) -> Path:
    return every_dtype(tmp_path / "source")


@pytest.mark.parametrize("to", ["orbax", "hf"])
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
    convert(write_published(tmp_path / "source", tensors), whole, to=to)
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
                expected = name if path.parent == whole else repr(path.parent.name)
            assert expected in " ".join(problems(whole))
        path.write_bytes(content)
    assert problems(whole) == []
    assert flips > 30


def test_every_byte_of_a_manifest_counts(tmp_path):
    rng = np.random.default_rng(0)
    convert(write_published(tmp_path / "source", {"a": random_tensor(rng, "F32", 4)}), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(_flipped(content, place, 0))
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(tmp_path / "out")


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

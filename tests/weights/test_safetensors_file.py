"""One .safetensors file: what is read is what was written, and every damage is a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmoe import CheckpointError
from jaxmoe.weights.safetensors_file import read_header

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def good(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "good.safetensors", metadata={"format": "pt"})
    return tmp_path / "good.safetensors"


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, whatever it says, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(shape: object, start: object, stop: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_every_tensor_reads_as_written(good):
    infos = read_header(good)
    assert infos.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert infos[name].shape == expected.shape
        assert infos[name].dtype == expected.dtype
        np.testing.assert_array_equal(infos[name].read_rows(0, expected.shape[0]), expected)


def test_rows_are_read_alone(good):
    np.testing.assert_array_equal(read_header(good)["a"].read_rows(1, 2), TENSORS["a"][1:2])
    np.testing.assert_array_equal(read_header(good)["c"].read_rows(1, 2), TENSORS["c"][1:2])


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100_000_001, 10**6])
def test_a_header_length_beyond_the_file_names_both(tmp_path, length):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(CheckpointError, match=rf"huge.safetensors has 110 bytes and a header length of {length}"):
        read_header(path)


def test_truncation_anywhere_is_an_error(good, tmp_path):
    content = good.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    cut = tmp_path / "cut.safetensors"
    for length in {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, *range(0, len(content), 7)}:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut.safetensors"):
            read_header(cut)


def test_bytes_after_the_last_tensor_are_an_error(good):
    good.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"good.safetensors.*ends at byte"):
        read_header(good)


def test_a_file_cut_after_its_header_was_read_is_an_error(good):
    info = read_header(good)["c"]
    good.write_bytes(good.read_bytes()[: info.start + 8])
    with pytest.raises(CheckpointError, match="ended inside tensor 'c'"):
        info.read_rows(0, 2)
    good.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        info.read_rows(0, 2)


def test_flipped_header_bytes_give_an_error_or_the_right_tensors(good, tmp_path):
    """Never another exception, never other numbers; a renamed tensor is for the caller to miss."""
    content = good.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    flipped, num_errors = tmp_path / "flipped.safetensors", 0
    for trial in range(1500):
        damaged = bytearray(content)
        for at in rng.integers(0, header_end, 1 + trial % 2):
            damaged[at] ^= 1 << int(rng.integers(0, 8)) if trial % 3 else int(rng.integers(1, 256))
        flipped.write_bytes(damaged)
        try:
            infos = read_header(flipped)
            found = {name: info.read_rows(0, info.shape[0]) for name, info in infos.items()}
        except CheckpointError:
            num_errors += 1
            continue
        for name in found.keys() & TENSORS.keys():
            if found[name].shape == TENSORS[name].shape:  # a wrong shape is for the caller to refuse
                np.testing.assert_array_equal(found[name], TENSORS[name])
    assert 1000 < num_errors < 1500


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (_entry([4], 0, 32), "needs 16 bytes, has 32"),
        (_entry([4], 16, 0), "has bytes 16..0 of 16"),
        (_entry([8], 0, 32), "has bytes 0..32 of 16"),
        (_entry([4], 2**62, 2**62 + 16), "has bytes"),
        (_entry([4], -16, 0), "not lists of whole numbers"),
        (_entry([4.0], 0, 16), "not lists of whole numbers"),
        (_entry([True, 4], 0, 16), "not lists of whole numbers"),
        (_entry([-4], 0, 16), "not lists of whole numbers"),
        (_entry(4, 0, 16), "not lists of whole numbers"),
        (_entry(None, 0, 16), "not lists of whole numbers"),
        (_entry({}, 0, 16), "not lists of whole numbers"),
        (_entry("4", 0, 16), "not lists of whole numbers"),
        (_entry([2**31, 2**31], 0, 16), "needs 18446744073709551616 bytes, has 16"),
        ({**_entry([4], 0, 16), "data_offsets": [0, 8, 16]}, "not lists of whole numbers"),
        ({**_entry([4], 0, 16), "data_offsets": 16}, "not lists of whole numbers"),
        ({"dtype": "F32", "shape": [4]}, "has no dtype, shape or data_offsets"),
        ([4], "has no dtype, shape or data_offsets"),
        (None, "has no dtype, shape or data_offsets"),
    ],
)
def test_a_bad_entry_is_named_with_its_values(tmp_path, entry, words):
    path = _write(tmp_path / "bad.safetensors", {"w": entry}, bytes(16) if "has 32" not in words else bytes(32))
    with pytest.raises(CheckpointError, match=rf"bad.safetensors: tensor 'w' .*{words}.*fetch it again"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a":' + b'{"dtype":"F32","shape":[],"data_offsets":[0,0]},"a":1}', "a name appears twice"),
    ],
)
def test_a_header_that_is_no_table_of_tensors(tmp_path, header, words):
    with pytest.raises(CheckpointError, match=f"bad.safetensors has a header that .*{words}"):
        read_header(_write(tmp_path / "bad.safetensors", header))


@pytest.mark.parametrize(("second", "words"), [((8, 24), "begins at byte"), ((24, 40), "begins at byte")])
def test_tensors_that_overlap_or_leave_a_gap(tmp_path, second, words):
    header = {"a": _entry([4], 0, 16), "b": _entry([4], *second)}
    with pytest.raises(CheckpointError, match=f"tensor 'b' {words}.*tensor 'a' ends at"):
        read_header(_write(tmp_path / "bad.safetensors", header, bytes(second[1])))


@pytest.mark.parametrize(("dtype", "num_bytes"), [("I32", 16), ("F8_E4M3", 4), ("U8", 4), ("odd", 7)])
def test_a_dtype_that_is_no_plain_float_is_named_when_it_is_needed(tmp_path, dtype, num_bytes):
    header = {"w": _entry([4], 0, num_bytes, dtype)}
    info = read_header(_write(tmp_path / "other.safetensors", header, bytes(num_bytes)))["w"]
    with pytest.raises(CheckpointError, match=f"tensor 'w' has dtype {dtype}; use F32, F16, BF16"):
        info.check_dtype()
    if dtype not in ("F8_E4M3", "U8"):
        with pytest.raises(CheckpointError, match=f"tensor 'w' has dtype {dtype}; use "):
            info.read_rows(0, 4)


def test_a_directory_in_place_of_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)

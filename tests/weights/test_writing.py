"""Writing past the system's cache, and through it where that cannot be: the same bytes at the same places."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.weights import writing
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.shards import ShardSink

CONTENT = np.random.default_rng(0).bytes(3 * 1000)


def _written(path: Path) -> bytes:
    """CONTENT in two parts, after what is there."""
    path.write_bytes(b"before" + bytes(len(CONTENT)))
    with open(path, "r+b", buffering=0) as file:
        file.seek(6)
        writing.write_all(file, memoryview(CONTENT)[:1234])
        writing.write_all(file, memoryview(CONTENT)[1234:])
        assert file.tell() == 6 + len(CONTENT)
    return path.read_bytes()


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_all_is_written_at_the_files_position(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_UNCACHED_BYTES", limit)
    assert _written(tmp_path / "file") == b"before" + CONTENT


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("good", [0, 2])
def test_a_kernel_or_file_system_that_cannot(number, good, tmp_path, monkeypatch):
    """Whether it says so at once or, as where a mount changes under a writer, later."""
    calls, write = [0], os.pwritev

    def some(*arguments):
        calls[0] += 1
        if calls[0] > good:
            raise OSError(number, os.strerror(number))
        return write(*arguments[:3])

    monkeypatch.setattr(writing, "_UNCACHED_BYTES", 100)
    monkeypatch.setattr(writing, "_CACHED_BYTES", 77)
    monkeypatch.setattr(os, "pwritev", some)
    assert _written(tmp_path / "file") == b"before" + CONTENT
    assert calls[0] > good


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        _written(tmp_path / "file")


def test_places_are_in_the_order_of_the_files(tmp_path):
    """Wide numbers come first in a file."""
    dtypes = {"a": "I8", "b": "F32", "c": "F16", "d": "F32"}
    sink = ShardSink(tmp_path, {name: TensorSpec(name=name, dtype=dtypes[name], shape=(4,)) for name in dtypes}, 30)
    assert sorted(dtypes, key=sink.place) == ["b", "c", "a", "d"]

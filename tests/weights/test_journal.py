"""A conversion that was killed goes on where it was and ends the same, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmoe.errors import CheckpointError
from jaxmoe.weights import convert as convert_module
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.journal import ConversionJournal, PartJournal, partial_path
from jaxmoe.weights.manifest import JOURNAL
from jaxmoe.weights.source import find_model

from .hf_checkpoints import bytes_of, contents, every_dtype

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def source(tmp_path) -> Path:
    return every_dtype(tmp_path / "source")


def _kill(tmp_path: Path, source: Path, seed: int, num_kills: int, to: str) -> dict[str, int]:
    flags = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = ["tests.weights.kill_probe", source, tmp_path / "killed", seed, num_kills, to]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=flags, capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "killed.whole")
    assert bytes_of(tmp_path / "killed") == bytes_of(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.whole", "source"]
    return json.loads(done.stdout)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_and_run_again_it_ends_the_same(to, source, tmp_path):
    found = _kill(tmp_path, source, seed=1, num_kills=5, to=to)
    assert found["killed"] >= 3  # steps get fewer as work is kept: some runs end before theirs


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_at_many_points(to, seed, source, tmp_path):
    assert _kill(tmp_path, source, seed=seed, num_kills=40, to=to)["killed"] >= 20


def _stop_after(monkeypatch, num_tensors: int) -> None:
    """Conversion fails, as for a full disk, once so many tensors are recorded."""
    record, count = convert_module.ConversionJournal.record, [0]

    def stopping(self, name, sums):
        if count[0] == num_tensors:
            raise OSError(28, "No space left on device", str(self.whole))
        count[0] += 1
        record(self, name, sums)

    monkeypatch.setattr(convert_module.ConversionJournal, "record", stopping)


def test_what_is_done_is_not_written_again(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        _stop_after(patched, 9)
        with pytest.raises(CheckpointError, match=r"No space left on device; .* are saved in orbax.partial"):
            convert(source, tmp_path / "orbax")
    partial = partial_path(tmp_path / "orbax")
    with pytest.raises(CheckpointError, match="is an unfinished conversion: run the same"):
        find_model(partial)
    with pytest.raises(CheckpointError):
        open_tensors(partial / "whole")
    lines = (partial / JOURNAL).read_text().splitlines()
    done = [json.loads(line)[0] for line in lines[1:]]
    assert len(done) == 9
    times = {path: path.stat().st_mtime_ns for name in done for path in (partial / "whole" / name).iterdir()}
    report = convert(source, tmp_path / "orbax")
    assert report.resumed_tensors == 9
    for path, time in times.items():
        assert (tmp_path / "orbax" / path.relative_to(partial / "whole")).stat().st_mtime_ns == time
    assert bytes_of(tmp_path / "orbax") == bytes_of(source)


def test_what_a_journal_says_is_read_before_it_is_believed(source, tmp_path, monkeypatch):
    """As after a power cut that took what had not reached the disk."""
    with monkeypatch.context() as patched:
        _stop_after(patched, 9)
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "orbax")
    journal = partial_path(tmp_path / "orbax") / JOURNAL
    first, second = (json.loads(line)[0] for line in journal.read_text().splitlines()[1:3])
    for chunk in (journal.parent / "whole" / first).glob("[0-9]*"):
        chunk.write_bytes(bytes(chunk.stat().st_size))
    shutil.rmtree(journal.parent / "whole" / second)
    journal.write_bytes(journal.read_bytes() + b'["torn", {"to')
    assert convert(source, tmp_path / "orbax").resumed_tensors in (7, 8)  # 8 where the first was empty
    assert bytes_of(tmp_path / "orbax") == bytes_of(source)


@pytest.mark.parametrize("line", ['["a", 5]', '[["x"], {}]', '["a", "xy"]', "[" * 100_000, '["of.U8"]'])
def test_lines_that_are_none_are_not_believed(line, source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        _stop_after(patched, 3)
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "orbax")
    journal = partial_path(tmp_path / "orbax") / JOURNAL
    journal.write_bytes(journal.read_bytes() + line.encode() + b"\n")
    assert convert(source, tmp_path / "orbax").resumed_tensors == 3
    assert bytes_of(tmp_path / "orbax") == bytes_of(source)


def test_a_source_that_changes_meanwhile_says_what_to_remove(source, tmp_path, monkeypatch):
    finish = convert_module.ShardSink.finish

    def changing(self):
        os.utime(source / "model.safetensors", ns=(1, 1))
        return finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(convert_module.ShardSink, "finish", changing)
        with pytest.raises(CheckpointError, match=f"the conversion: remove {partial_path(tmp_path / 'hf')} and run"):
            convert(source, tmp_path / "hf", to="hf")
    shutil.rmtree(partial_path(tmp_path / "hf"))
    convert(source, tmp_path / "hf", to="hf")


def test_a_source_is_not_taken_for_unfinished_work(source, tmp_path):
    source = source.rename(tmp_path / "out.partial")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out has its unfinished work in .*out.partial, which contains"):
        convert(source, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "tensor=8"}, "mesh_devices=1, this run has mesh_devices=8"),
        ({"weights_dtype": "float32"}, "weights_dtype=None"),
        ({"to": "hf"}, "to='orbax', this run has to='hf'"),
        (None, "another source"),
    ],
)
def test_other_work_is_not_gone_on_with(options, words, source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        _stop_after(patched, 3)
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "orbax")
    if options is None:
        os.utime(source / "model.safetensors", ns=(1, 1))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"was started with {words}"):
        convert(source, tmp_path / "orbax", **(options or {}))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_another_source_of_the_same_sizes_and_times_is_not_gone_on_with(kind, source, tmp_path, monkeypatch):
    """As cp -p brings it."""
    convert(source, tmp_path / kind, to=kind)
    with monkeypatch.context() as patched:
        _stop_after(patched, 3)
        with pytest.raises(CheckpointError):
            convert(tmp_path / kind, tmp_path / "out")
    path = tmp_path / kind / ("model.safetensors" if kind == "hf" else "of.U8/0.0")
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="was started with another source"):
        convert(tmp_path / kind, tmp_path / "out")


@pytest.fixture
def killed_at_the_end(source, tmp_path, monkeypatch) -> Path:
    """A destination of a process that was killed just after it had committed."""
    with monkeypatch.context() as patched:
        patched.setattr("jaxmoe.weights.journal.shutil.rmtree", lambda *_, **__: None)
        convert(source, tmp_path / "out")
    assert partial_path(tmp_path / "out").exists()
    return tmp_path / "out"


def test_what_a_killed_process_committed_is_known(killed_at_the_end, source):
    report = convert(source, killed_at_the_end, verify=True)
    assert (report.resumed_tensors, report.verified) == (report.num_tensors, True)
    assert not partial_path(killed_at_the_end).exists()


def test_what_a_killed_process_committed_is_verified_where_that_is_asked(killed_at_the_end, source):
    chunk = killed_at_the_end / "of.U8" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"tensor 'of.U8' differs from its checksum"):
        convert(source, killed_at_the_end, verify=True)


def test_another_checkpoint_is_not_what_a_killed_process_committed(killed_at_the_end, source, tmp_path):
    """Of the same tensors, dtypes and options, but other numbers."""
    convert(every_dtype(tmp_path / "other", seed=1), tmp_path / "others")
    shutil.rmtree(killed_at_the_end)
    (tmp_path / "others").rename(killed_at_the_end)
    with pytest.raises(CheckpointError, match=f"destination {killed_at_the_end} exists: name another"):
        convert(source, killed_at_the_end)


def test_records_of_other_processes_are_taken_over(tmp_path):
    """By the first process, of this run or of the next, with any number of processes; not while they are written."""
    destination, options = tmp_path / "out", {"a": 1}
    with ConversionJournal(destination, options) as journal:
        token = journal.create_parts(3)
        journal.record("a", {"a": "0"})
        parts = [PartJournal(destination, token, index) for index in (1, 2)]
        parts[0].record("b", {"b": "1"})
        parts[0].record("b", {"b.scale": "2"})
        parts[1].record("a", {"a.scale": "3"})
        parts[1]._file.write(b'["torn", {"to')
    with pytest.raises(CheckpointError, match="is being written by another process"):
        ConversionJournal(destination, options)
    for part in parts:
        part.close()
    expected = {"a": {"a": "0", "a.scale": "3"}, "b": {"b": "1", "b.scale": "2"}}
    for _ in range(2):
        with ConversionJournal(destination, options) as journal:
            assert journal.finished == expected
            assert sorted(path.name for path in journal.folder.iterdir()) == [JOURNAL, "whole"]
    with (
        ConversionJournal(destination, options) as journal,
        PartJournal(destination, journal.create_parts(2), 1) as part,
    ):
        assert part.finished == expected


def test_a_destination_that_another_process_does_not_see(tmp_path):
    with ConversionJournal(tmp_path / "out", {}) as journal:
        token = journal.create_parts(2)
    words = r"out.partial, which process 0 has created, is not seen by process 1: .* on a file system that all"
    for destination in (tmp_path / "out", tmp_path / "elsewhere" / "out"):
        other = token if destination.parent != tmp_path else "another run"
        with pytest.raises(CheckpointError, match=words):
            PartJournal(destination, other, 1, seen_within=0)

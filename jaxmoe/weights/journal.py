"""The journal of a conversion, which lets a killed conversion resume.

DESTINATION.partial/ contains the journal and the folder whole/, which one rename turns into the destination. The first
line of the journal has the options of the conversion. Each further line names a source tensor whose outputs are
written, with their checksums. The last line, written just before the rename, has the checksum of the manifest. A line
may be incomplete, and its tensors may not have reached the disk when the machine lost power. So a resumed conversion
reads these tensors again and checks them before it relies on the line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.manifest import JOURNAL, MANIFEST, sum_file

SUFFIX, WHOLE = ".partial", "whole"
_SYNCS = 32  # concurrent fsync calls


def partial_path(destination: Path) -> Path:
    """Return the folder of the unfinished conversion to a destination."""
    return destination.with_name(destination.name + SUFFIX)


class ConversionJournal:
    """Create or resume the unfinished conversion to a destination, locked by one process at a time.

    Raises: CheckpointError if another process holds the lock, or the conversion was started with other options.
    """

    def __init__(self, destination: Path, options: Mapping[str, Any]) -> None:
        self._destination, self.folder = destination, partial_path(destination)
        self.whole = self.folder / WHOLE
        self.finished: dict[str, dict[str, str]] = {}
        strange = os.path.lexists(self.folder) and not self.folder.is_dir()
        if strange or (self.folder.exists() and not (self.folder / JOURNAL).is_file() and any(self.folder.iterdir())):
            raise CheckpointError(
                f"{self.folder} exists and is not a resumable conversion: remove it, or choose another destination"
            )
        self.folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._file = open(self.folder / JOURNAL, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{self.folder} is being written by another process: wait until it ends") from error
        try:
            self._read(json.dumps(options, sort_keys=True))
        except BaseException:
            self._file.close()
            raise

    def _read(self, options: str) -> None:
        self._file.seek(0)
        first, *lines = self._file.read().split(b"\n")
        if not lines:  # the first line is incomplete
            shutil.rmtree(self.whole, ignore_errors=True)
            self._file.truncate(0)
            self._file.write(options.encode() + b"\n")
        elif first.decode(errors="replace") != options:
            raise CheckpointError(
                f"{self.folder} was started with {_difference(first, options)}: use the same options to resume it, or "
                f"remove it to start again"
            )
        else:
            good = len(first) + 1
            for line in lines[:-1]:
                try:
                    name, sums = json.loads(line)
                    self.finished[name] = dict(sums)
                except (ValueError, TypeError, RecursionError):
                    break
                good += len(line) + 1
            self._file.truncate(good)
        self.whole.mkdir(exist_ok=True)

    def record(self, name: str, sums: Mapping[str, str]) -> None:
        """Record that the outputs of a source tensor are written. sums: their sha256 by name."""
        with self._lock:
            self._file.write(json.dumps([name, dict(sums)]).encode() + b"\n")

    def commit(self) -> None:
        """Sync all files to disk, then rename the folder to the destination.

        Raises: CheckpointError if the destination exists.
        """
        sync_tree(self.whole)
        self._file.write(_commit_line(self.whole) + b"\n")
        os.fsync(self._file.fileno())
        if os.path.lexists(self._destination):
            raise CheckpointError(
                f"destination {self._destination} was created during the conversion: move it away and run again"
            )
        self.whole.rename(self._destination)
        _sync(self._destination.parent)
        shutil.rmtree(self.folder)

    def __enter__(self) -> ConversionJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._file.close()


def end_committed(destination: Path, options: Mapping[str, Any]) -> bool:
    """Return whether a conversion with the same options was killed just after it committed this destination.

    If so, remove the journal that it left.
    """
    folder = partial_path(destination)
    if not (destination / MANIFEST).is_file() or not (folder / JOURNAL).is_file() or (folder / WHOLE).exists():
        return False
    lines = (folder / JOURNAL).read_bytes().split(b"\n")
    if lines[0] != json.dumps(options, sort_keys=True).encode() or lines[-2:] != [_commit_line(destination), b""]:
        return False
    shutil.rmtree(folder)
    return True


def _commit_line(whole: Path) -> bytes:
    return json.dumps([MANIFEST, {MANIFEST: sum_file(whole / MANIFEST).sha256}]).encode()


def _difference(begun: bytes, options: str) -> str:
    try:
        before, now = json.loads(begun), json.loads(options)
        key = next(key for key in now if before.get(key) != now[key])
        return "another source" if key == "source" else f"{key}={before.get(key)!r}, this run has {key}={now[key]!r}"
    except (ValueError, AttributeError, StopIteration, RecursionError):
        return "other options"


def sync_tree(folder: Path) -> None:
    """Sync every file and folder of a directory tree to disk."""
    paths = [Path(at) / name for at, _, files in os.walk(folder) for name in (*files, ".")]
    with ThreadPoolExecutor(_SYNCS) as workers:  # a file system merges concurrent syncs
        list(workers.map(_sync, paths))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

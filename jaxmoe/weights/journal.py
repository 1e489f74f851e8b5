"""The journal of a conversion, which lets a killed conversion resume.

DESTINATION.partial/ contains the journal and the folder whole/, which one rename turns into the destination. The first
line of the journal has the options of the conversion. Each further line names a source tensor whose outputs are
written, with their checksums. The last line, written just before the rename, has the checksum of the manifest. A line
may be incomplete, and its tensors may not have reached the disk when the machine lost power. So a resumed conversion
reads these tensors again and checks them before it relies on the line.

If several processes convert, each but process 0 has a journal of its own in the folder. Process 0 moves their records
into its own when it starts and when all have finished. So any number of processes may resume the conversion.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.manifest import JOURNAL, MANIFEST, sum_file

SUFFIX, WHOLE = ".partial", "whole"
SEEN_WITHIN_SECONDS = 60.0  # clients of NFS may remember for so long that a folder is missing
_POLL_SECONDS = 0.05
_SYNCS = 32  # concurrent fsync calls


def partial_path(destination: Path) -> Path:
    """Return the folder of the unfinished conversion to a destination."""
    return destination.with_name(destination.name + SUFFIX)


class TensorRecords:
    """Append records of finished tensors to a file that this process has locked.

    folder: that of the unfinished conversion, with the file and the folder whole/. finished: checksums of the outputs
    of earlier runs, by source tensor and name.
    """

    def __init__(self, folder: Path, file: IO[bytes]) -> None:
        """Lock the file. Raises: CheckpointError if another process holds the lock."""
        self.folder, self.whole = folder, folder / WHOLE
        self.finished: dict[str, dict[str, str]] = {}
        self._lock, self._file = threading.Lock(), file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise CheckpointError(f"{folder} is being written by another process: wait until it ends") from error

    def record(self, name: str, sums: Mapping[str, str]) -> None:
        """Record that outputs of a source tensor are written. sums: their sha256 by name."""
        with self._lock:
            self._file.write(json.dumps([name, dict(sums)]).encode() + b"\n")

    def close(self) -> None:
        """Close the file, which unlocks it."""
        self._file.close()

    def _take(self, lines: Sequence[bytes]) -> int:
        """Add the records of lines to the finished ones, up to the first bad line; return the number of good lines."""
        for number, line in enumerate(lines):
            try:
                name, sums = json.loads(line)
                self.finished[name] = self.finished.get(name, {}) | dict(sums)
            except (ValueError, TypeError, RecursionError):
                return number
        return len(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()


class ConversionJournal(TensorRecords):
    """Create or resume the unfinished conversion to a destination, locked by one process at a time.

    Raises: CheckpointError if another process holds the lock, or the conversion was started with other options.
    """

    def __init__(self, destination: Path, options: Mapping[str, Any]) -> None:
        self._destination, folder = destination, partial_path(destination)
        strange = os.path.lexists(folder) and not folder.is_dir()
        if strange or (folder.exists() and not (folder / JOURNAL).is_file() and any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} exists and is not a resumable conversion: remove it, or choose another destination"
            )
        folder.mkdir(exist_ok=True)
        super().__init__(folder, open(folder / JOURNAL, "a+b", buffering=0))  # noqa: SIM115
        try:
            self._read(json.dumps(options, sort_keys=True))
            self.absorb_parts()
        except BaseException:
            self.close()
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
            good = self._take(lines[:-1])
            self._file.truncate(sum(len(line) + 1 for line in (first, *lines[:good])))
        self.whole.mkdir(exist_ok=True)

    def create_parts(self, num_processes: int) -> str:
        """Create the journals of the other processes, and return the token of their names."""
        token = secrets.token_hex(4)
        for index in range(1, num_processes):
            _part_path(self.folder, token, index).touch(exist_ok=False)
        os.fsync(self._file.fileno())  # they read it, maybe on other hosts
        return token

    def absorb_parts(self) -> None:
        """Move the records of the journals of other processes into this one.

        Raises: CheckpointError if such a process still writes.
        """
        for path in sorted(self.folder.glob(_part_path(Path(), "*", "*").name)):
            with TensorRecords(self.folder, open(path, "r+b", buffering=0)) as part:
                lines = part._file.read().split(b"\n")[:-1]
                good = self._take(lines)
                self._file.write(b"".join(line + b"\n" for line in lines[:good]))
                os.fsync(self._file.fileno())
                path.unlink()

    def commit(self) -> None:
        """Sync all files to disk, then rename the folder whole/ to the destination.

        Raises: CheckpointError if the destination exists.
        """
        sync_trees([self.whole])
        self._file.write(_commit_line(self.whole) + b"\n")
        os.fsync(self._file.fileno())
        if os.path.lexists(self._destination):
            raise CheckpointError(
                f"destination {self._destination} was created during the conversion: move it away and run again"
            )
        self.whole.rename(self._destination)
        _sync(self._destination.parent)

    def remove(self) -> None:
        """Remove the folder of the conversion, which is committed."""
        shutil.rmtree(self.folder)


class PartJournal(TensorRecords):
    """Record the tensors that one of several processes writes, other than process 0.

    token: the result of ConversionJournal.create_parts in process 0. seen_within: seconds to wait for the file, which
    some network file systems show late.
    Raises: CheckpointError if the file does not appear.
    """

    def __init__(
        self, destination: Path, token: str, process_id: int, *, seen_within: float = SEEN_WITHIN_SECONDS
    ) -> None:  # fmt: skip
        folder = partial_path(destination)
        path, deadline = _part_path(folder, token, process_id), time.monotonic() + seen_within
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder}, which process 0 has created, is not seen by process {process_id}: name a destination "
                    f"on a file system that all processes share"
                )
            time.sleep(_POLL_SECONDS)
        super().__init__(folder, open(path, "r+b", buffering=0))  # noqa: SIM115
        self._take((folder / JOURNAL).read_bytes().split(b"\n")[1:-1])


def _part_path(folder: Path, token: str, process_id: int | str) -> Path:
    """Return the journal of a process other than process 0."""
    return folder / f"{Path(JOURNAL).stem}.{token}.{process_id}{Path(JOURNAL).suffix}"


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


def sync_trees(folders: Collection[Path]) -> None:
    """Sync every file and folder of directory trees, and single files, to disk."""
    paths = [Path(at) / name for folder in folders for at, _, files in os.walk(folder) for name in (*files, ".")]
    paths += [path for path in folders if path.is_file()]
    with ThreadPoolExecutor(_SYNCS) as workers:  # a file system merges concurrent syncs
        list(workers.map(_sync, paths))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

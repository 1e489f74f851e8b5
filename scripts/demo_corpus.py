"""Training corpus: sources of the running Python's standard library. A fixed list of modules is for evaluation only."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxmoe.errors import ConfigError

# Evaluation only. These modules are of several kinds, exist in every supported Python, and have no near-duplicate.
HELD_OUT = (
    "argparse.py", "bisect.py", "calendar.py", "cmd.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py",
    "queue.py", "sched.py", "shlex.py", "statistics.py", "textwrap.py",
)  # fmt: skip

# Tests, separate programs, generated tables, modules that only some Pythons include, machine-specific files.
_SKIPPED_DIRS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "lib2to3", "distutils",
    "pydoc_data", "encodings", "lib-dynload", "__phello__", "ensurepip",
}  # fmt: skip
_SKIPPED_FILES = ("html/entities.py", "_sysconfigdata", "config-")

LICENSE = "PSF-2.0 (Python Software Foundation License Version 2)"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """Hold the text of one module and its path below the standard library."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Hold the disjoint training and evaluation files, each sorted by name."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    def describe(self) -> dict[str, object]:
        """Return the manifest entry of the data: origin, license and size."""
        return {
            "description": "sources and docstrings of Python's standard library, without tests, tables and idlelib",
            "license": LICENSE,
            "python": platform.python_version(),
            "num_training_files": len(self.training),
            "num_training_bytes": num_bytes(self.training),
            "training_sha256": _digest(self.training),
            "num_held_out_files": len(self.held_out),
            "num_held_out_bytes": num_bytes(self.held_out),
            "held_out_files": [file.name for file in self.held_out],
        }


def read_corpus(root: Path | None = None) -> Corpus:
    """Read every module below root, sorted by path. Files that are not UTF-8 are skipped.

    root: the running Python's standard library by default.
    Raises: ConfigError if root has no sources or lacks a module of HELD_OUT.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = tuple(_read(root))
    held_out = tuple(file for file in files if file.name in HELD_OUT)
    training = tuple(file for file in files if file.name not in HELD_OUT)
    if missing := sorted(set(HELD_OUT) - {file.name for file in held_out}):
        raise ConfigError(f"{root} lacks {', '.join(missing)}: install the sources of Python's standard library")
    if not training:
        raise ConfigError(f"{root} has no modules to train on: install the sources of Python's standard library")
    return Corpus(training=training, held_out=held_out)


def _read(root: Path) -> Iterator[SourceFile]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if _SKIPPED_DIRS.intersection(relative.parts[:-1]) or name.startswith(_SKIPPED_FILES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield SourceFile(name=name, text=text.replace("\r\n", "\n"))


def num_bytes(files: Sequence[SourceFile]) -> int:
    """Count the UTF-8 bytes of the files' texts."""
    return sum(len(file.text.encode()) for file in files)


def _digest(files: Sequence[SourceFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.text}\0".encode())
    return digest.hexdigest()

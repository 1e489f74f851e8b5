"""Conversion between Hugging Face and Orbax checkpoints, with bounded memory and resumable after a kill.

Finished tensors are recorded in a journal next to the destination (journal.py). One rename creates the destination at
the end, with a manifest of checksums in it. Several processes may share the work: each writes some of the files, and
process 0 the manifest and all other files. The reasons: docs/decisions/0010-orbax-holds-published-tensors.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxmoe.config import canonical_dtype
from jaxmoe.errors import CheckpointError
from jaxmoe.families import FAMILIES
from jaxmoe.families.quantization_reader import read_quantization_config
from jaxmoe.parallel.mesh import parse_mesh
from jaxmoe.parallel.processes import ProcessGroup
from jaxmoe.quantization.formats import QUANTIZATION_CONFIG
from jaxmoe.weights.budget import MemoryBudget, resident_bytes
from jaxmoe.weights.checkpoint import BESIDE, CONFIG
from jaxmoe.weights.dequantize import DerivedTensor, plain_tensors
from jaxmoe.weights.division import WorkDivision
from jaxmoe.weights.dtypes import TensorSpec
from jaxmoe.weights.journal import (
    WHOLE,
    ConversionJournal,
    PartJournal,
    TensorRecords,
    end_committed,
    partial_path,
    sync_trees,
)
from jaxmoe.weights.manifest import KINDS, MANIFEST, CheckpointManifest, FileEntry, TensorEntry, sum_file
from jaxmoe.weights.quantize_transform import transform_of
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.shards import ShardSink
from jaxmoe.weights.source_checkpoint import SourceCheckpoint, open_source_checkpoint
from jaxmoe.weights.store import StoreSink
from jaxmoe.weights.stream import CheckpointSink, ConversionExecutor, ConversionTask
from jaxmoe.weights.transform import TensorTransform
from jaxmoe.weights.verify import check_whole

DEFAULT_RAM_GIB = 4.0
_MAX_DEVICES = 2**20
_RAM_LIMITS = (0.125, 2.0**20)
_MARGIN_BYTES = 16 << 20  # disk space for the journal and the manifest
_MARGIN_FILES = 8  # the journal, the manifest and their folders
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Report the result of a conversion.

    resumed_tensors: tensors that an earlier, killed run had finished. buffer_bytes: the peak of buffers in use, out of
    budget_bytes. peak_rss_bytes: peak resident memory of the process. rss_before_bytes: its resident memory before the
    conversion. left_behind: files of the source that were not copied. Of several processes, each reports its own memory
    and process 0 all resumed tensors.
    """

    source: str
    destination: str
    kind: str
    num_tensors: int
    num_bytes: int
    resumed_tensors: int
    seconds: float
    ram_gib: float
    budget_bytes: int
    buffer_bytes: int
    rss_before_bytes: int
    peak_rss_bytes: int
    config_check: str
    left_behind: tuple[str, ...]
    verified: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def convert(
    source: Path, destination: Path, *, to: str | None = None, mesh: str | None = None,
    weights_dtype: str | None = None, ram_gib: float = DEFAULT_RAM_GIB, verify: bool = False,
    ignore_config_keys: Iterable[str] = (), on_progress: OnProgress = lambda done, total: None,
    group: ProcessGroup | None = None,
) -> ConversionReport:  # fmt: skip
    """Convert a checkpoint directory to another format, resuming an interrupted conversion.

    After a kill, a call with the same options resumes from DESTINATION.partial. All of the input is checked before
    anything is written.

    Args:
        source: Checkpoint directory to read.
        destination: Directory to create.
        to: Format to write: "orbax" or "hf". Default: the opposite of the source.
        mesh: Mesh axes or a preset. Its devices will read whole chunks; the result still loads on any mesh.
        weights_dtype: "float32", "bfloat16" or "float16" casts floating-point tensors to this dtype and dequantizes
            quantized ones. "int8", "fp8" or "fp8-block" quantizes the matrices that would be quantized on load. None
            preserves every bit.
        ram_gib: Memory in GiB that each process may use in addition to its memory at the start.
        verify: Check a converted source against its checksums first, and read the result again at the end.
        ignore_config_keys: Keys of config.json to ignore.
        on_progress: Called with (source bytes done, total bytes), of this process's part, by any thread, one at a time.
        group: The joined processes that all call this with the same arguments and share the work, or None. All of them
            see the source and the destination's folder.

    Returns:
        The sizes, time, memory use and checks of the conversion.

    Raises:
        CheckpointError: The source, the destination or an option is invalid, or reading or writing fails.
        ConfigError, MeshError: config.json or mesh is invalid.
    """
    started, rss_before = time.perf_counter(), resident_bytes()
    division = WorkDivision(group)
    budget, num_shares = MemoryBudget(_half(ram_gib)), _num_devices(mesh)
    ignore = [ignore_config_keys] if isinstance(ignore_config_keys, str) else list(ignore_config_keys)
    if to is not None and to not in KINDS:
        raise CheckpointError(f"to={to!r} must be one of {', '.join(KINDS)}")
    source_checkpoint = open_source_checkpoint(source, ignore_config_keys=ignore)
    weights_dtype = None if weights_dtype is None else canonical_dtype(weights_dtype)
    transform = transform_of(weights_dtype, source_checkpoint, ignore_config_keys=ignore)
    kind = to or {"hf": "orbax", "orbax": "hf"}[source_checkpoint.kind]
    destination = _checked_destination(source, destination, kind=kind, mesh=mesh)
    options = {"to": kind, "mesh_devices": num_shares, "weights_dtype": weights_dtype}
    division.agree(**{"the source": source_checkpoint.summary()}, **options, verify=verify)
    job = _ConversionJob(
        source_checkpoint=source_checkpoint, destination=destination, transform=transform, budget=budget,
        options=options, division=division,
    )  # fmt: skip
    num_resumed = job.run(int(ram_gib * 2**30), verify, on_progress)
    return ConversionReport(
        source=str(source), destination=str(destination), kind=kind, num_tensors=len(job.outputs),
        num_bytes=sum(spec.num_bytes for spec in job.outputs.values()), resumed_tensors=num_resumed,
        seconds=time.perf_counter() - started, ram_gib=ram_gib, budget_bytes=budget.limit_bytes,
        buffer_bytes=budget.peak_bytes, rss_before_bytes=rss_before, peak_rss_bytes=resident_bytes(peak=True),
        config_check=source_checkpoint.config_check, left_behind=source_checkpoint.left_behind, verified=verify,
    )  # fmt: skip


def _num_devices(mesh: str | None) -> int:
    count = math.prod(parse_mesh(mesh).values()) if mesh is not None else 1
    if count > _MAX_DEVICES:
        raise CheckpointError(f"mesh={mesh!r} has {count} devices, at most {_MAX_DEVICES} are allowed: name fewer")
    return count


def _half(ram_gib: float) -> int:
    """Return the bytes for buffers: half of ram_gib. The rest is for other memory of the conversion."""
    if not (math.isfinite(ram_gib) and _RAM_LIMITS[0] <= ram_gib <= _RAM_LIMITS[1]):
        raise CheckpointError(f"ram_gib={ram_gib} must lie in [{_RAM_LIMITS[0]}, {_RAM_LIMITS[1]:.0f}] GiB")
    return int(ram_gib * 2**29)


def _checked_destination(source: Path, destination: Path, *, kind: str, mesh: str | None) -> Path:
    """Return the absolute destination. Raises: CheckpointError if it or the mesh cannot be."""
    if mesh is not None and kind != "orbax":
        raise CheckpointError(
            f"mesh={mesh!r} sets the chunks of an orbax checkpoint, to={kind!r} has no chunks: leave it out"
        )
    destination = Path(os.path.abspath(destination))
    if not destination.name:
        raise CheckpointError(f"destination {destination} exists: name another, or move it away")
    if source.resolve().is_relative_to(partial_path(destination).resolve()):
        raise CheckpointError(
            f"destination {destination} has its unfinished work in {partial_path(destination)}, which contains the "
            f"source: name another"
        )
    return destination


def _check_destination(source_checkpoint: SourceCheckpoint, destination: Path) -> None:
    parent = destination.parent
    if os.path.lexists(destination):
        raise CheckpointError(f"destination {destination} exists: name another, or move it away")
    if not parent.is_dir():
        raise CheckpointError(f"destination {destination} lies in {parent}, which is not a directory: create it first")
    if destination.resolve().is_relative_to(source_checkpoint.directory.resolve()):
        raise CheckpointError(f"destination {destination} lies inside the source, which stays untouched: name another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"destination {destination} lies in {parent}, which is not writable: name another")


class _ConversionJob:
    """Run one conversion: plan its tasks, write the tensors and side files, and commit the destination.

    options: the options that an unfinished conversion depends on, the same in all processes.
    """

    def __init__(
        self,
        *,
        source_checkpoint: SourceCheckpoint,
        destination: Path,
        options: dict[str, Any],
        transform: TensorTransform,
        budget: MemoryBudget,
        division: WorkDivision,
    ) -> None:
        self._source_checkpoint, self._destination, self._options = source_checkpoint, destination, options
        self._transform, self._budget, self._division = transform, budget, division
        self._fingerprint = source_checkpoint.fingerprint()
        self.options = {"source": _common_fingerprint(self._fingerprint, division), **options}
        self._tasks = [
            ConversionTask(tensor=tensor, spec=spec, outputs=(outputs := transform.outputs(spec)), written=outputs)
            for tensor, spec in _sources(source_checkpoint, plain=options["weights_dtype"] is not None)
        ]
        self.outputs: dict[str, TensorSpec] = {}
        for task in self._tasks:
            for output in task.outputs:
                if output.name in self.outputs:
                    raise CheckpointError(f"tensor {output.name!r} would be written twice: rename one in the source")
                self.outputs[output.name] = output

    def _sink(self, whole: Path) -> CheckpointSink:
        if self._options["to"] == "orbax":
            return StoreSink(whole, self.outputs, self._options["mesh_devices"])
        return ShardSink(whole, self.outputs)

    def run(self, ram_bytes: int, verify: bool, on_progress: OnProgress) -> int:
        """Check, convert and commit; return the number of source tensors that an earlier run had finished."""
        source, destination = self._source_checkpoint, self._destination
        if self._division.from_first(lambda: end_committed(destination, self.options)):
            if verify:
                check_whole(destination, division=self._division)
            return len(self.outputs)
        self._division.from_first(lambda: _check_destination(source, destination))
        if verify and source.manifest is not None:
            check_whole(source.directory, division=self._division)
        return self._write(ram_bytes, verify, on_progress)

    def _write(self, ram_bytes: int, verify: bool, on_progress: OnProgress) -> int:
        sink = self._sink(partial_path(self._destination) / WHOLE)
        tasks = self._own_tasks(sink)
        total = sum(task.source_bytes(task.spec.num_bytes) for task in tasks)
        done, lock = 0, threading.Lock()

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                on_progress(done, total)

        try:
            if self._division.is_first:
                self._check_room(sink)
            with self._journal(sink) as journal:
                return self._into(journal, sink, tasks, ram_bytes, verify, on_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self._destination}: {error.strerror}; fix that and run the same command again: "
                f"finished tensors are saved in {partial_path(self._destination).name}"
            ) from error

    def _own_tasks(self, sink: CheckpointSink) -> list[ConversionTask]:
        """Return the tasks of this process in the order to run them. No other process writes to the same files.

        A task whose outputs lie in files of two processes is a task of both, and each writes its own outputs.
        """
        tasks = sorted(self._tasks, key=lambda task: _order(sink, task))
        num_bytes: Counter[str] = Counter()
        for task in tasks:
            for output in task.outputs:
                num_bytes[_unit(sink, task, output)] += output.num_bytes
        own = self._division.own(num_bytes)
        divided = (
            replace(task, written=tuple(output for output in task.outputs if _unit(sink, task, output) in own))
            for task in tasks
        )
        return [task for task in divided if task.written]

    @contextmanager
    def _journal(self, sink: CheckpointSink) -> Iterator[TensorRecords]:
        """Open the journal of this process, once process 0 has created the files that all write to."""
        journal: ConversionJournal | PartJournal
        if self._division.is_first:
            journal = ConversionJournal(self._destination, self.options)
        else:
            journal = PartJournal(self._destination, self._division.share(), self._division.process_id)
        with journal:
            if isinstance(journal, ConversionJournal):
                sink.create()
                self._division.share(journal.create_parts(self._division.num_processes))
            self._division.barrier()  # every process holds the lock of its journal
            yield journal

    def _into(
        self, journal: TensorRecords, sink: CheckpointSink, tasks: list[ConversionTask], ram_bytes: int, verify: bool,
        on_bytes: Callable[[int], None],
    ) -> int:  # fmt: skip
        known = self._source_checkpoint.manifest
        executor = ConversionExecutor(
            sink=sink, transform=self._transform, budget=self._budget, ram_bytes=ram_bytes,
            expected=None if known is None else {name: entry.sha256 for name, entry in known.tensors.items()},
            finished=journal.finished, record=journal.record, on_bytes=on_bytes,
        )  # fmt: skip
        try:
            sums = executor.run(tasks)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (finished tensors are saved in {journal.folder.name})") from error
        if not isinstance(journal, ConversionJournal):
            sync_trees({sink.written(output.name).path for task in tasks for output in task.written})
            journal.close()  # for process 0, which moves its records
        parts = self._division.collect(sums=sums, num_resumed=executor.num_resumed)
        if isinstance(journal, ConversionJournal):
            journal.absorb_parts()
            self._finish(journal.whole, sink, {name: value for part in parts for name, value in part["sums"].items()})
        self._division.barrier()
        if verify:
            check_whole(journal.whole, division=self._division)
        self._check_unchanged(journal.folder)
        self._division.barrier()
        if isinstance(journal, ConversionJournal):
            journal.commit()
        self._division.barrier()  # until here, the same command finishes what a kill leaves
        if isinstance(journal, ConversionJournal):
            journal.remove()
        return sum(part["num_resumed"] for part in parts)

    def _check_unchanged(self, folder: Path) -> None:
        """Raise CheckpointError if the source has changed since the conversion began. folder: of the journal."""
        source = open_source_checkpoint(self._source_checkpoint.directory, check_config=False)
        if source.fingerprint() != self._fingerprint:
            raise CheckpointError(
                f"{self._source_checkpoint.directory} changed during the conversion: remove {folder} and "
                f"run again once the source no longer changes"
            )

    def _finish(self, whole: Path, sink: CheckpointSink, sums: dict[str, str]) -> None:
        """Write the side files, finish the sink, and write the manifest last."""
        files: dict[str, FileEntry] = {}
        changed = self._transform.config(dict(self._source_checkpoint.config))
        for name in self._source_checkpoint.side_files:
            if name in (CONFIG, BESIDE) and changed != self._source_checkpoint.config:
                if name == CONFIG:
                    (whole / name).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
                    files[name] = sum_file(whole / name)
                continue
            (whole / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._source_checkpoint.directory / name, whole / name)
            files[name] = sum_file(whole / name)
        files |= sink.finish()
        tensors = {
            name: TensorEntry(spec=spec, sha256=sums[name], chunk=sink.chunks[name])
            for name, spec in self.outputs.items()
        }
        manifest = CheckpointManifest(kind=sink.kind, options=self._options, tensors=tensors, files=files)
        (whole / MANIFEST).write_bytes(manifest.dump())

    def _check_room(self, sink: CheckpointSink) -> None:
        """Raise CheckpointError if the disk lacks space or inodes for the remaining files."""
        bytes_there, files_there = _allocated(partial_path(self._destination))
        side = [
            os.stat(self._source_checkpoint.directory / name).st_size for name in self._source_checkpoint.side_files
        ]
        needed = sink.disk_bytes() + sum(side) + _MARGIN_BYTES - bytes_there
        free = shutil.disk_usage(self._destination.parent).free
        if needed > free:
            raise CheckpointError(
                f"destination {self._destination} needs {needed / 2**30:.3f} GiB more and its disk has "
                f"{free / 2**30:.3f} GiB free: make room, or choose another disk"
            )
        num_files = sink.num_files() + len(side) + _MARGIN_FILES - files_there
        disk = os.statvfs(self._destination.parent)
        if disk.f_files and num_files > disk.f_favail:  # f_files is 0 if the file system allocates inodes on demand
            raise CheckpointError(
                f"destination {self._destination} needs {num_files} more files and its disk has room for "
                f"{disk.f_favail}: remove some, or choose another disk"
            )


def _common_fingerprint(fingerprint: str, division: WorkDivision) -> str:
    """Return the fingerprint of the source, or a hash of all if the processes read different copies of it."""
    fingerprints = [part["fingerprint"] for part in division.collect(fingerprint=fingerprint)]
    same = len(set(fingerprints)) < 2
    common: str = division.from_first(
        lambda: fingerprints[0] if same else hashlib.sha256("".join(fingerprints).encode()).hexdigest()
    )
    return common


def _unit(sink: CheckpointSink, task: ConversionTask, output: TensorSpec) -> str:
    """Return the name of a unit that one process writes: a file of several tensors, or the outputs of a task."""
    return sink.place(output.name)[0] or task.spec.name


def _order(sink: CheckpointSink, task: ConversionTask) -> tuple[tuple[str, int], Path, int]:
    """Return the sort key of a task: its offset in the destination, then its offset in the source.

    Writing out of order costs more than reading out of order.
    """
    return sink.place(task.outputs[0].name), task.tensor.path, task.tensor.start


def _sources(
    source_checkpoint: SourceCheckpoint, *, plain: bool
) -> Iterator[tuple[TensorInfo | DerivedTensor, TensorSpec]]:
    """Yield the tensors to convert. plain: dequantize quantized tensors. Raises: CheckpointError, ConfigError."""
    how = read_quantization_config(source_checkpoint.config.get(QUANTIZATION_CONFIG)) if plain else None
    if how is None:
        yield from ((source_checkpoint.tensors[name], spec) for name, spec in source_checkpoint.specs.items())
        return
    family = FAMILIES.get(str(source_checkpoint.config.get("model_type")))
    turn_experts = family is None or family.names.fused is not None
    for tensor in plain_tensors(source_checkpoint.tensors, how, turn_experts=turn_experts):
        yield tensor, tensor.spec if isinstance(tensor, DerivedTensor) else source_checkpoint.specs[tensor.name]


def _allocated(folder: Path) -> tuple[int, int]:
    """Return the allocated bytes of a directory tree, and its number of files and folders."""
    paths = [Path(at) / name for at, _, names in os.walk(folder) for name in (".", *names)]
    return sum(os.lstat(path).st_blocks * 512 for path in paths), len(paths)

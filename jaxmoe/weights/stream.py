"""Streaming tensors from one checkpoint into another, slice by slice, by threads that share a memory budget."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import compress
from typing import Protocol

import numpy as np

from jaxmoe.errors import CheckpointError
from jaxmoe.weights.budget import MemoryBudget, resident_bytes
from jaxmoe.weights.dequantize import DerivedTensor
from jaxmoe.weights.dtypes import DTYPES, TensorSpec
from jaxmoe.weights.manifest import FileEntry
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.transform import TensorTransform
from jaxmoe.weights.verify import sum_tensor

_SLICE_BYTES = 4 << 20
_MAX_WORKERS = 16

Sums = dict[str, str]  # sha256 of each output, by name


class TensorWriter(Protocol):
    """Write a tensor's bytes in order."""

    def append(self, part: memoryview) -> None:
        """Write the next bytes."""
        ...

    def close(self) -> None:
        """Finish the tensor."""
        ...


class CheckpointSink(Protocol):
    """Write converted tensors to a folder that becomes a checkpoint of one kind ("hf" or "orbax")."""

    kind: str
    chunks: Mapping[str, tuple[int, ...] | None]

    def disk_bytes(self) -> int:
        """Return the disk space of the checkpoint in bytes."""
        ...

    def num_files(self) -> int:
        """Return the number of files and folders."""
        ...

    def create(self) -> None:
        """Create the files that writers need; do not change existing ones."""
        ...

    def place(self, name: str) -> tuple[str, int]:
        """Return the location of a tensor. Writing tensors in the order of locations is fastest."""
        ...

    def writer(self, name: str) -> TensorWriter:
        """Return a writer that takes the bytes of a tensor in order."""
        ...

    def written(self, name: str) -> TensorInfo:
        """Return a finished tensor for reading."""
        ...

    def finish(self) -> dict[str, FileEntry]:
        """Write the remaining files of the checkpoint and return the entries of its files."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConversionTask:
    """Describe a source tensor, its outputs, and the outputs that this process writes."""

    tensor: TensorInfo | DerivedTensor
    spec: TensorSpec
    outputs: tuple[TensorSpec, ...]
    written: tuple[TensorSpec, ...]

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """Return the stored tensors that the source tensor is read from."""
        return self.tensor.sources if isinstance(self.tensor, DerivedTensor) else (self.tensor,)

    @property
    def untouched(self) -> bool:
        """Return whether conversion copies the tensor's bits unchanged."""
        return isinstance(self.tensor, TensorInfo) and self.outputs == (self.spec,)

    @property
    def granule(self) -> int:
        """Return the alignment of slices, in numbers of the source tensor."""
        return self.tensor.row_numbers if isinstance(self.tensor, DerivedTensor) else 1

    def source_bytes(self, num_bytes: int) -> int:
        """Return approximately how many bytes of files give num_bytes of the tensor, for progress reports."""
        made = self.tensor
        return num_bytes * made.source_bytes // max(1, made.num_bytes) if isinstance(made, DerivedTensor) else num_bytes


@dataclass(kw_only=True)
class ConversionExecutor:
    """Run conversion tasks by several threads within a memory budget.

    ram_bytes: allowed growth of resident memory. budget: the budget for buffers. expected: sha256 of every source
    tensor, if the source has a manifest. finished: checksums of finished tasks from the journal; their outputs are read
    and checked again. record: called with the name and checksums of each finished task. on_bytes: called with the
    number of source bytes done. num_resumed: number of tasks that were finished before; the process that
    writes the first output counts a task.
    """

    sink: CheckpointSink
    transform: TensorTransform
    budget: MemoryBudget
    ram_bytes: int
    expected: Sums | None
    finished: Mapping[str, Sums]
    record: Callable[[str, Sums], None]
    on_bytes: Callable[[int], None]
    sums: Sums = field(default_factory=dict)
    num_resumed: int = 0

    def run(self, tasks: Sequence[ConversionTask]) -> Sums:
        """Run all tasks; return the sha256 of every output that is written.

        Raises: the exception of the first thread that failed.
        """
        self._resident_before, self._stop, self._lock = resident_bytes(), threading.Event(), threading.Lock()
        need = self._need(_SLICE_BYTES)
        num_workers = max(1, min(_MAX_WORKERS, 2 * (os.cpu_count() or 1), self.budget.limit_bytes // need))
        source = iter(tasks)
        with ThreadPoolExecutor(num_workers) as workers:
            try:
                running = [workers.submit(self._work, source) for _ in range(num_workers)]
                ended, _ = wait(running, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
        for future in ended:
            future.result()
        return self.sums

    def _need(self, slice_bytes: int) -> int:
        """Return the bytes of buffers that a slice needs."""
        return int(slice_bytes * (1 + self.transform.working_ratio))

    def _work(self, source: Iterator[ConversionTask]) -> None:
        while not self._stop.is_set():
            with self._lock:
                task = next(source, None)
            if task is None:
                return
            try:
                sums = self._again(task) or self._written(task)
            except BaseException:
                self._stop.set()
                raise
            with self._lock:
                self.sums |= sums
            grown = resident_bytes() - self._resident_before
            if grown > self.ram_bytes:
                raise CheckpointError(
                    f"memory grew by {grown / 2**30:.2f} GiB, --ram-gib is {self.ram_bytes / 2**30:.2f}: raise it and "
                    f"run the same command again"
                )

    def _again(self, task: ConversionTask) -> Sums | None:
        """Return the checksums of a task that an earlier run finished; None if its outputs are absent or differ."""
        recorded = self.finished.get(task.spec.name, {})
        said = {output.name: recorded[output.name] for output in task.written if output.name in recorded}
        if len(said) < len(task.written):
            return None
        with self.budget.take(min(_SLICE_BYTES, self.budget.limit_bytes), "reading finished tensors"):
            try:
                actual = {name: sum_tensor(self.sink.written(name), step_bytes=_SLICE_BYTES) for name in said}
            except CheckpointError:
                return None
        if actual != said:
            return None
        with self._lock:
            self.num_resumed += task.written[0] == task.outputs[0]
        self.on_bytes(task.source_bytes(task.spec.num_bytes))
        return actual

    def _written(self, task: ConversionTask) -> Sums:
        self._check(task)
        kept = [output in task.written for output in task.outputs]
        digests = [hashlib.sha256() for _ in task.written]
        step = self._slice_bytes(task)
        total, dtype = task.spec.num_bytes, DTYPES[task.spec.dtype].numpy
        with ExitStack() as stack:
            stack.enter_context(self.budget.take(self._need(min(step, total)), f"tensor {task.spec.name!r}"))
            writers = [stack.enter_context(closing(self.sink.writer(output.name))) for output in task.written]
            buffer = np.empty(min(step, total), np.uint8)
            for start in range(0, total, step):
                if self._stop.is_set():
                    return {}
                part = buffer[: min(step, total - start)]
                task.tensor.read_bytes(start, memoryview(part))
                made = self.transform.apply(task.spec, part.view(dtype))
                for writer, digest, numbers in zip(writers, digests, compress(made, kept), strict=True):
                    content = memoryview(numbers.view(np.uint8))
                    digest.update(content)
                    writer.append(content)
                self.on_bytes(task.source_bytes(len(part)))
        sums = {output.name: digest.hexdigest() for output, digest in zip(task.written, digests, strict=True)}
        self._check(task, sums)
        self.record(task.spec.name, sums)
        return sums

    def _check(self, task: ConversionTask, written: Sums | None = None) -> None:
        """Compare a source tensor with its checksum, if the source has a manifest.

        A tensor that is transformed is checked before, a tensor that is copied unchanged after its output is written.
        Raises: CheckpointError if the checksum differs.
        """
        if self.expected is None or task.untouched != (written is not None):
            return
        if written is None:
            with self.budget.take(min(_SLICE_BYTES, self.budget.limit_bytes), "reading the source"):
                written = {source.name: sum_tensor(source, step_bytes=_SLICE_BYTES) for source in task.sources}
        for name, actual in written.items():
            if self.expected[name] != actual:
                raise CheckpointError(
                    f"tensor {name!r} of the source differs from its checksum: corrupt; fetch or convert it again"
                )

    def _slice_bytes(self, task: ConversionTask) -> int:
        """Return the bytes of a slice: as many whole granules as the budget allows, and at least one."""
        granule = max(1, math.lcm(self.transform.granule(task.spec), task.granule)) * task.spec.itemsize
        room = min(_SLICE_BYTES, int(self.budget.limit_bytes / (1 + self.transform.working_ratio)))
        return max(1, room // granule) * granule

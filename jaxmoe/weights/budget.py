"""Memory under a cap: buffers are taken from a budget, and what the process holds is asked of the system."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmoe.errors import CheckpointError

_STATUS = Path("/proc/self/status")


class MemoryBudget:
    """Bytes of buffers that may be in flight; who asks for more waits until others have given theirs back."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.peak_bytes, self._held = limit_bytes, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, num_bytes: int, what: str) -> Iterator[None]:
        """Hold so many bytes. Raises: CheckpointError if that is more than the whole budget."""
        if num_bytes > self.limit_bytes:
            raise CheckpointError(
                f"{what} needs {num_bytes} bytes of buffers, the budget is {self.limit_bytes}, half of --ram-gib: "
                f"raise it to at least {2 * num_bytes / 2**30:.2g}"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._held + num_bytes <= self.limit_bytes)
            self._held += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._held)
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process, now or at most so far; at most wherever the system tells no more."""
    if _STATUS.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

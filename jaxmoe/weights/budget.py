"""Memory limits: a budget for buffers, and the resident memory of the process."""

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
    """Limit the bytes of buffers in use. A thread that exceeds the limit waits until others release buffers."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.peak_bytes, self._held = limit_bytes, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, num_bytes: int, what: str) -> Iterator[None]:
        """Reserve num_bytes inside the context. Raises: CheckpointError if that exceeds the whole budget."""
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
    """Return the resident memory of this process in bytes.

    peak: return the highest value so far. Systems without /proc always report the peak.
    """
    if _STATUS.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""The division of work on a checkpoint between joined processes, and their exchange of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.parallel.processes import ProcessGroup


class WorkDivision:
    """Divide work between joined processes by bytes. group: None in a process by itself, which does everything.

    Every process calls the same methods in the same order. Exchanged values consist of JSON.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.num_processes = 1 if group is None else group.num_processes
        self.process_id = 0 if group is None else group.process_id

    @property
    def is_first(self) -> bool:
        """Return whether this is process 0, which does all work that is not divided."""
        return self.process_id == 0

    def own(self, num_bytes: Mapping[str, int]) -> set[str]:
        """Return the names of this process's part: consecutive ones, with about an equal share of the bytes."""
        total, start, own = sum(num_bytes.values()), 0, set()
        for name, size in num_bytes.items():
            owner = (2 * start + size) * self.num_processes // max(1, 2 * total)  # of the middle of its bytes
            if min(owner, self.num_processes - 1) == self.process_id:
                own.add(name)
            start += size
        return own

    def agree(self, **values: Any) -> None:
        """Wait for all processes, and end them with one line that names both values if a value differs."""
        if self._group is not None:
            self._group.agree(**values)

    def collect(self, **values: Any) -> list[dict[str, Any]]:
        """Return the values of all processes in process 0, an empty list in others. Waits for all processes."""
        return [values] if self._group is None else self._group.collect(**values)

    def from_first(self, function: Callable[[], Any]) -> Any:
        """Call function in process 0 only, and return its result in all. Waits for all processes."""
        return self.share(function() if self.is_first else None)

    def share(self, value: Any = None) -> Any:
        """Return the value of process 0. Waits for all processes."""
        return value if self._group is None else self._group.share(value=value)["value"]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self._group is not None:
            self._group.barrier()


ALONE = WorkDivision()  # a process by itself

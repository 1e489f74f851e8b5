"""Parts of work: all of it, once, in runs, and about as many bytes for each process."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from jaxmoe.weights.division import ALONE, WorkDivision


def parts(sizes: dict[str, int], num_processes: int) -> list[list[str]]:
    """The names of each process's part, in order."""
    groups = [SimpleNamespace(num_processes=num_processes, process_id=index) for index in range(num_processes)]
    owned = [WorkDivision(group).own(sizes) for group in groups]
    return [[name for name in sizes if name in own] for own in owned]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_every_name_has_one_owner_and_shares_are_about_equal(num_processes):
    rng = random.Random(num_processes)
    for count in (1, 5, 200):
        sizes = {f"t{index}": rng.choice((0, 1, 7, 100, 1000)) for index in range(count)}
        found = parts(sizes, num_processes)
        assert [name for part in found for name in part] == list(sizes)
        bytes_of_parts = [sum(sizes[name] for name in part) for part in found]
        even = sum(sizes.values()) / num_processes
        assert all(abs(num_bytes - even) <= max(sizes.values()) for num_bytes in bytes_of_parts)


def test_names_without_bytes_are_done_once():
    assert parts({"a": 0, "b": 0}, 3) == [["a", "b"], [], []]
    assert parts({"a": 4, "b": 4, "c": 0}, 2) == [["a"], ["b", "c"]]
    assert parts({}, 2) == [[], []]


def test_a_process_by_itself_waits_for_none():
    assert ALONE.is_first
    assert ALONE.own({"a": 1, "b": 0}) == {"a", "b"}
    assert ALONE.collect(a=1) == [{"a": 1}]
    assert ALONE.from_first(lambda: 7) == ALONE.share(7) == 7
    ALONE.agree(a=1)
    ALONE.barrier()

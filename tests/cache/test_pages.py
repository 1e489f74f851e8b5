"""The page pool by cases; tests/engine/test_scheduler.py drives it through random schedules."""

from __future__ import annotations

import pytest

from jaxmoe.cache.pages import PageCopy, PagePool


def match(pool: PagePool, tokens: list[int], limit: int) -> list[int]:
    return pool.match_prefix(tokens, limit=limit).on_device


def num_on_host(pool: PagePool, tokens: list[int], limit: int) -> int:
    prefix = pool.match_prefix(tokens, limit=limit)
    return prefix.num_pages - prefix.num_behind - len(prefix.on_device)


def test_pages_are_taken_all_or_none():
    pool = PagePool(num_pages=3, page_size=2)
    assert pool.allocate(4) is None
    mine = pool.allocate(2)
    assert mine is not None
    assert (len(set(mine)), pool.num_available, pool.num_in_use) == (2, 1, 2)
    pool.decref(mine)
    assert pool.num_available == 3
    pool.check()


def test_a_known_beginning_is_found_page_by_page():
    pool = PagePool(num_pages=4, page_size=2)
    mine = pool.allocate(3)
    before = list(mine)
    pool.insert_prefix(mine, [1, 2, 3, 4, 5], start=0, stop=1)
    pool.insert_prefix(mine, [1, 2, 3, 4, 5], start=1, stop=2)  # the third page is not full
    assert mine == before
    assert match(pool, [1, 2, 3, 4, 9], 5) == mine[:2]
    assert match(pool, [1, 2, 3, 4], 3) == mine[:1]
    assert match(pool, [1, 9, 3, 4], 4) == []
    assert match(pool, [3, 4], 2) == []  # the same tokens after another beginning are another page
    pool.check()


def test_the_same_tokens_are_kept_once():
    pool = PagePool(num_pages=4, page_size=2)
    first, second = pool.allocate(2), pool.allocate(2)
    own = second[1]
    pool.insert_prefix(first, [1, 2, 3, 4], start=0, stop=2)
    pool.insert_prefix(second, [1, 2, 7, 8], start=0, stop=2)
    assert second == [first[0], own]
    assert pool.num_available == 1
    pool.check()
    pool.decref(first)
    assert match(pool, [1, 2, 7, 8], 4) == [first[0], second[1]]
    pool.decref([first[0], second[1]])
    assert pool.num_available == 4
    pool.check()


def test_the_longest_idle_end_of_a_prompt_goes_first():
    pool = PagePool(num_pages=4, page_size=1)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.insert_prefix(old, [1, 2], start=0, stop=2)
    pool.insert_prefix(new, [3, 4], start=0, stop=2)
    pool.decref(old)
    pool.decref(new)
    assert pool.allocate(1) == [old[1]]
    assert match(pool, [1, 2], 2) == old[:1]
    assert match(pool, [3, 4], 2) == new
    assert pool.num_evicted == 1
    pool.check()


def test_held_pages_are_never_evicted():
    pool = PagePool(num_pages=2, page_size=1)
    mine = pool.allocate(2)
    pool.insert_prefix(mine, [1, 2], start=0, stop=2)
    pool.decref(mine)
    pool.incref(match(pool, [1], 1))
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [mine[1]]
    pool.check()


def test_a_page_that_must_go_moves_to_host_memory_and_back():
    pool = PagePool(num_pages=2, page_size=1, num_host_pages=2)
    first = pool.allocate(2)
    pool.insert_prefix(first, [1, 2], start=0, stop=2)
    pool.decref(first)
    other = pool.allocate(2)
    assert pool.pending_copies == [PageCopy("out", first[1], 0), PageCopy("out", first[0], 1)]
    assert match(pool, [1, 2], 2) == []
    assert (num_on_host(pool, [1, 2, 3], 3), pool.num_on_host) == (2, 2)
    pool.check()
    pool.decref(other)
    pool.pending_copies.clear()
    back = pool.acquire_prefix([1, 2, 3], limit=3)
    assert [(page_copy.direction, page_copy.page, page_copy.host_page) for page_copy in pool.pending_copies] == [
        ("in", back[0], 1),
        ("in", back[1], 0),
    ]
    assert match(pool, [1, 2], 2) == back
    assert (pool.num_in_use, pool.num_on_host, pool.num_swapped_in) == (2, 0, 2)
    pool.check()


def test_host_memory_is_bounded_and_the_longest_there_goes_first():
    pool = PagePool(num_pages=1, page_size=1, num_host_pages=2)
    for token in (1, 2, 3, 4):
        page = pool.allocate(1)
        pool.insert_prefix(page, [token], start=0, stop=1)
        pool.decref(page)
        pool.check()
    assert [num_on_host(pool, [token], 1) for token in (1, 2, 3)] == [0, 1, 1]
    assert match(pool, [4], 1)


def test_what_is_computed_again_takes_the_place_of_what_lies_on_the_host():
    pool = PagePool(num_pages=2, page_size=1, num_host_pages=4)
    first = pool.allocate(2)
    pool.insert_prefix(first, [1, 2], start=0, stop=2)
    pool.decref(first)
    again = pool.allocate(2)
    pool.insert_prefix(again, [1, 2], start=0, stop=2)
    assert (pool.num_on_host, match(pool, [1, 2], 2)) == (0, again)
    pool.check()


def in_windows(num_pages: int, window: int, **more: int) -> PagePool:
    """A pool of pages of one token, where a token sees the last `window`."""
    return PagePool(
        num_pages=num_pages, page_size=1, first_visible=lambda position: max(0, position - window + 1), **more
    )


def test_pages_behind_a_window_are_taken_first_and_those_after_them_still_found():
    pool = in_windows(5, window=3)
    mine = pool.allocate(5)
    pool.insert_prefix(mine, [1, 2, 3, 4, 5], start=0, stop=5)
    pool.decref(mine[:2])
    assert (pool.num_available, pool.num_in_use) == (2, 3)
    assert pool.allocate(2) == [mine[1], mine[0]]  # nobody holds them; the last was released first
    pool.check()
    # A sixth token sees the fourth and fifth, which are there; a fourth sees the second, which is not.
    assert pool.match_prefix([1, 2, 3, 4, 5, 6], limit=5) == (5, 3, mine[3:])
    assert pool.match_prefix([1, 2, 3, 9], limit=3) == (0, 0, [])
    assert pool.match_prefix([1, 2, 3, 4, 5, 6], limit=5, whole=True) == (0, 0, [])
    assert pool.acquire_prefix([1, 2, 3, 4, 5, 6], limit=5) == [-1, -1, -1, *mine[3:]]
    pool.decref([-1, -1, -1, *mine[3:]])
    pool.decref(mine[2:])
    pool.check()
    assert pool.allocate(3) is not None  # nothing is known any more, and no part of the tree is left
    assert pool.match_prefix([1, 2, 3, 4, 5, 6], limit=5) == (0, 0, [])
    pool.check()


def test_a_page_given_up_is_known_again_once_it_is_computed_again():
    pool = in_windows(4, window=2)
    mine = pool.allocate(3)
    pool.insert_prefix(mine, [1, 2, 3], start=0, stop=3)
    pool.decref(mine[:2])
    other = pool.allocate(3)
    assert pool.match_prefix([1, 2, 3, 4], limit=3) == (3, 2, mine[2:])
    assert pool.match_prefix([1, 5], limit=1) == (0, 0, [])
    pool.insert_prefix(other, [1, 5, 6], start=0, stop=3)
    assert pool.match_prefix([1, 5], limit=1) == (1, 0, other[:1])
    pool.check()


def test_pages_are_shared_after_those_that_were_given_back_unshared():
    pool = in_windows(4, window=1)
    mine = pool.allocate(4)
    pool.decref(mine[:3])
    pool.insert_prefix([-1, -1, -1, mine[3]], [1, 2, 3, 4], start=0, stop=3)
    pool.check()
    pool.insert_prefix([-1, -1, -1, mine[3]], [1, 2, 3, 4], start=3, stop=4)
    assert pool.match_prefix([1, 2, 3, 4, 5], limit=4) == (4, 4, [])
    pool.check()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_check_themselves(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        PagePool(num_pages=sizes[0], page_size=sizes[1])


def test_discarded_pages_are_found_no_more_nor_those_after_them():
    pool = PagePool(num_pages=8, page_size=2)
    shared, other = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]
    mine = pool.allocate(3)
    pool.insert_prefix(mine, shared, start=0, stop=3)
    theirs = pool.allocate(3)
    pool.insert_prefix(theirs, other, start=0, stop=3)
    pool.decref(mine)
    pool.discard(mine)  # the first two are held by the other
    assert pool.match_prefix(shared, limit=6).on_device == theirs[:2] == mine[:2]
    assert pool.match_prefix(other, limit=6).on_device == theirs
    pool.check()
    pool.decref(theirs)
    pool.discard(theirs[:1])
    assert pool.match_prefix(other, limit=6) == (0, 0, [])
    assert pool.num_in_use == 0
    pool.check()


def test_with_windows_discarded_pages_leave_later_ones_to_their_holders():
    pool = PagePool(num_pages=8, page_size=1, first_visible=lambda position: max(0, position - 1))
    mine = pool.allocate(4)
    pool.insert_prefix(mine, [1, 2, 3, 4], start=0, stop=4)
    pool.decref(mine[:2])  # behind the window: pages 2 and 3 are still held
    pool.discard(mine[:1])
    pool.check()
    assert pool.num_in_use == 2
    pool.decref(mine[2:])
    pool.check()
    pool.discard(mine[2:])
    assert pool.num_in_use == 0
    assert pool.match_prefix([1, 2, 3, 4, 5], limit=4) == (0, 0, [])
    whole = pool.allocate(3)
    pool.insert_prefix([whole[0], -1, whole[2]], [1, 2, 3], start=0, stop=3)  # the second was given back before
    pool.decref(whole)
    pool.discard(whole[:1])
    pool.check()
    assert pool.match_prefix([1, 2, 3, 4], limit=3) == (0, 0, [])
    pool.check()

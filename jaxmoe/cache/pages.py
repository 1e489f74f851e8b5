"""The pages of one pool: who holds each, which prompt's beginning it keeps, which goes first when room is needed.

A page holds the keys and values of page_size consecutive tokens. A full page whose tokens, and all tokens before them,
are known is *shared*: it hangs in a tree under the page before it, and a later prompt that begins with the same tokens
takes it instead of computing it. Pages nobody holds stay in the tree until room is needed; then the one that was
released longest ago, of those with no page after them, is taken first.

With places in host memory, a page that is taken so moves there and stays in the tree; a prompt that begins with it
brings it back. `moves` says what is to be copied, in the order in which it must be.

Source of the idea: vLLM's block manager (Kwon et al., 2023) and SGLang's radix tree (Zheng et al., 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One page to be copied: "out" to a place in host memory, or "in" from there."""

    way: Literal["out", "in"]
    page: int
    place: int


@dataclass(eq=False)
class _Shared:
    """A page in the tree of known beginnings: on the device, or (page -1) at a place in host memory."""

    page: int
    tokens: Tokens
    parent: _Shared | None
    children: dict[Tokens, _Shared] = field(default_factory=dict)
    place: int = -1

    def is_last(self) -> bool:
        """Whether no page after it is on the device."""
        return all(child.page < 0 for child in self.children.values())


class PagePool:
    """num_pages pages of page_size tokens, and num_places for pages in host memory. Both are numbered from 0.

    Raises: ValueError for sizes below 1.
    """

    def __init__(self, *, num_pages: int, page_size: int, num_places: int = 0) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self._blank = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._root = _Shared(-1, (), None)
        self._shared: dict[int, _Shared] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # shared, held by nobody; longest idle first
        self._blank_places = list(range(num_places - 1, -1, -1))
        self._on_host: OrderedDict[int, _Shared] = OrderedDict()  # by place; longest there first
        self.moves: list[Move] = []  # to be taken by whoever owns the pool, in order
        self.num_evicted = self.num_brought_back = 0

    @property
    def num_on_host(self) -> int:
        """Pages kept in host memory."""
        return len(self._on_host)

    @property
    def num_free(self) -> int:
        """Pages that can be had: blank ones, and those kept only in case a prompt begins alike."""
        return len(self._blank) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that requests hold."""
        return self.num_pages - self.num_free

    def match(self, tokens: Sequence[int], *, limit: int) -> list[int]:
        """The shared pages on the device whose tokens `tokens` begins with, at most `limit` tokens. Holds none."""
        return [node.page for node in self._walk(tokens, limit) if node.page >= 0]

    def num_matched_on_host(self, tokens: Sequence[int], *, limit: int) -> int:
        """How many pages that follow those of match are in host memory."""
        return sum(node.page < 0 for node in self._walk(tokens, limit))

    def bring_back(self, tokens: Sequence[int], *, limit: int) -> list[int]:
        """Pages of one's own that the pages counted by num_matched_on_host move into; they are shared, and held.

        The caller holds the pages before them. As many as there is room for.
        """
        nodes = [node for node in self._walk(tokens, limit) if node.page < 0]
        for node in nodes:
            del self._on_host[node.place]  # none of them may make room for another
        pages = []
        for index, node in enumerate(nodes):
            taken = self.take(1)
            if taken is None:
                self._on_host |= {left.place: left for left in nodes[index:]}
                break
            self.moves.append(Move("in", taken[0], node.place))
            self._blank_places.append(node.place)
            node.page, node.place = taken[0], -1
            self._shared[node.page] = node
            pages += taken
        self.num_brought_back += len(pages)
        return pages

    def _walk(self, tokens: Sequence[int], limit: int) -> list[_Shared]:
        node, found = self._root, []
        for end in range(self.page_size, min(limit, len(tokens)) + 1, self.page_size):
            child = node.children.get(tuple(tokens[end - self.page_size : end]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def num_idle_of(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody holds: holding them leaves so many fewer to be had."""
        return sum(page in self._idle for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of these shared pages."""
        for page in pages:
            assert page in self._shared, f"page {page} is not shared"
            self._holders[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int] | None:
        """`count` pages of one's own, or None (and nothing changed) where there are not so many."""
        if count > self.num_free:
            return None
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def _evict(self) -> int:
        """The page that was idle longest of those with nothing on the device hanging under them, off the device."""
        page = next(page for page in self._idle if self._shared[page].is_last())
        node = self._shared.pop(page)
        del self._idle[page]
        self.num_evicted += 1
        place = self._take_place()
        if place is None:
            self._forget(node)
        else:
            self.moves.append(Move("out", page, place))
            node.page, node.place = -1, place
            self._on_host[place] = node
        return page

    def _take_place(self) -> int | None:
        """A place in host memory, that of the page longest there where all are taken."""
        if not self._blank_places:
            oldest = next((node for node in self._on_host.values() if not node.children), None)
            if oldest is not None:
                self._forget(oldest)
        return self._blank_places.pop() if self._blank_places else None

    def _forget(self, node: _Shared) -> None:
        """Out of the tree, with what hangs under it in host memory."""
        assert node.parent is not None
        del node.parent.children[node.tokens]
        falling = [node]
        while falling:
            gone = falling.pop()
            falling += gone.children.values()
            if gone.place >= 0:
                del self._on_host[gone.place]
                self._blank_places.append(gone.place)

    def share(self, pages: list[int], tokens: Sequence[int], *, start: int, stop: int, replace: bool = True) -> int:
        """Make known that pages [start, stop) of the caller's hold the tokens there; those before start are known.

        Where the tree already has a page with the same tokens, that one takes the place of the caller's own in `pages`,
        which becomes blank; without replace (the caller's is still being written) sharing ends before it. Returns up to
        where pages are shared now.
        """
        node = self._shared[pages[start - 1]] if start else self._root
        for index in range(start, stop):
            part = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            child = node.children.get(part)
            page = pages[index]
            if child is None:
                child = _Shared(page, part, node)
                node.children[part] = child
                self._shared[page] = child
            elif child.page < 0:  # known in host memory: the one here takes its place
                del self._on_host[child.place]
                self._blank_places.append(child.place)
                child.page, child.place = page, -1
                self._shared[page] = child
            elif child.page != page:
                if not replace:
                    return index
                self.hold([child.page])
                self._release_one(page)
                pages[index] = child.page
            node = child
        return max(start, stop)

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each. Shared pages nobody holds stay known; the last of a prompt goes first."""
        for page in reversed(pages):
            self._release_one(page)

    def _release_one(self, page: int) -> None:
        assert self._holders[page] > 0, f"page {page} is held by nobody"
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._shared:
            self._idle[page] = None
        else:
            self._blank.append(page)

    def discard(self, pages: Sequence[int]) -> None:
        """Forget those of these pages that nobody holds, and the shared pages after them: all become blank."""
        for page in pages:
            if page not in self._idle:
                continue
            falling = [self._shared[page]]
            self._forget(falling[0])
            while falling:  # who holds a page holds those before it: nobody holds these
                gone = falling.pop()
                falling += gone.children.values()
                if gone.page >= 0:
                    del self._idle[gone.page], self._shared[gone.page]
                    self._blank.append(gone.page)

    def check(self) -> None:
        """Asserts that every page is blank, idle or held, and that the tree is whole. For tests."""
        assert len(set(self._blank)) == len(self._blank)
        for page in range(self.num_pages):
            blank, idle = page in set(self._blank), page in self._idle
            assert blank + idle + (self._holders[page] > 0) == 1, page
            assert not (blank and page in self._shared), page
            assert not idle or page in self._shared, page
        assert len(self._blank_places) == len(set(self._blank_places))
        assert not set(self._blank_places) & set(self._on_host)
        for place, node in self._on_host.items():
            assert (node.page, node.place) == (-1, place)
            assert node.is_last()
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
        for page, node in self._shared.items():
            assert node.page == page
            assert node.place == -1
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            if self._holders[page] and node.parent is not self._root:  # who holds a page holds those before it
                assert self._holders[node.parent.page] > 0

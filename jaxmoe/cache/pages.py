"""Page pool of one rank: reference counts, a prefix cache over full pages, LRU eviction, offload to host memory.

A page holds the keys and values of page_size consecutive tokens. A full page whose tokens, and all tokens before them,
are known is *cached*: it is a node of a radix tree, below the page before it, and a later prompt with the same prefix
reuses it. A cached page that no request references stays until room is needed (*evictable*); the least recently
released one without children on the device is evicted first.

Where every layer has a window, pages behind it are released while their request runs on, and may be evicted before
those that follow them. The tree keeps the tokens of such a page, so that its children are still matched: a prompt with
that prefix needs no more than the pages that its next token sees.

With host pages, an evicted page is copied to host memory and stays in the tree; a prompt that matches it swaps it in.
`pending_copies` lists the copies to be made, in the order in which they must be.

Source of the idea: vLLM's block manager (Kwon et al., 2023) and SGLang's radix tree (Zheng et al., 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PageCopy:
    """A copy of one page: "out" to a host page, or "in" from there."""

    direction: Literal["out", "in"]
    page: int
    host_page: int


@dataclass(eq=False)
class _PrefixNode:
    """A node of the prefix cache: a page on the device, or (page -1) a host page; neither (host_page -1) where it
    was dropped and pages after it are still cached."""

    page: int
    tokens: Tokens
    parent: _PrefixNode | None
    children: dict[Tokens, _PrefixNode] = field(default_factory=dict)
    host_page: int = -1

    def is_last(self) -> bool:
        """Return whether no child is on the device."""
        return all(child.page < 0 for child in self.children.values())

    def is_gone(self) -> bool:
        """Return whether neither the device nor host memory holds it."""
        return self.page < 0 and self.host_page < 0


class PrefixMatch(NamedTuple):
    """The longest cached prefix of a prompt: its number of pages; how many of them the next token does not see any
    more; those of the others that are on the device."""

    num_pages: int
    num_behind: int
    on_device: list[int]


class PagePool:
    """num_pages pages of page_size tokens on the device, and num_host_pages in host memory. Both are numbered from 0.

    first_visible: the first position that the token at a position, or any later one, sees; None where all are seen.
    Raises: ValueError for sizes below 1.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, num_host_pages: int = 0,
        first_visible: Callable[[int], int] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_pages, self.page_size, self._first_visible = num_pages, page_size, first_visible
        self._free = list(range(num_pages - 1, -1, -1))
        self._ref_counts = [0] * num_pages
        self._root = _PrefixNode(-1, (), None)
        self._cached: dict[int, _PrefixNode] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached, not referenced; least recently used first
        self._free_host_pages = list(range(num_host_pages - 1, -1, -1))
        self._on_host: OrderedDict[int, _PrefixNode] = OrderedDict()  # by host page; oldest first
        self.pending_copies: list[PageCopy] = []  # to be taken by whoever owns the pool, in order
        self.num_evicted = self.num_swapped_in = 0

    @property
    def num_on_host(self) -> int:
        """Pages held in host memory."""
        return len(self._on_host)

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_in_use(self) -> int:
        """Pages that requests reference."""
        return self.num_pages - self.num_available

    def match_prefix(self, tokens: Sequence[int], *, limit: int, whole: bool = False) -> PrefixMatch:
        """Match the longest cached prefix of `tokens`, at most `limit` tokens. References nothing.

        whole: none of its pages may be missing, whether the next token sees them or not.
        """
        nodes, num_behind = self._match(tokens, limit, whole)
        return PrefixMatch(len(nodes), num_behind, [node.page for node in nodes[num_behind:] if node.page >= 0])

    def acquire_prefix(self, tokens: Sequence[int], *, limit: int, whole: bool = False) -> list[int]:
        """Reference the prefix that match_prefix matches, and swap in its host pages, for which the caller has checked
        the room.

        Returns its pages in order, -1 for each that the next token does not see.
        """
        nodes, num_behind = self._match(tokens, limit, whole)
        seen = nodes[num_behind:]
        self.incref([node.page for node in seen if node.page >= 0])
        self._swap_in([node for node in seen if node.page < 0])
        return [-1] * num_behind + [node.page for node in seen]

    def _swap_in(self, nodes: Sequence[_PrefixNode]) -> None:
        """Allocate device pages for nodes in host memory and queue the copies; they are cached and referenced.
        There must be room."""
        for node in nodes:
            del self._on_host[node.host_page]  # none of them may make room for another
        for node in nodes:
            taken = self.allocate(1)
            assert taken is not None, "there is no room to swap pages in"
            self.pending_copies.append(PageCopy("in", taken[0], node.host_page))
            self._free_host_pages.append(node.host_page)
            node.page, node.host_page = taken[0], -1
            self._cached[node.page] = node
        self.num_swapped_in += len(nodes)

    def _match(self, tokens: Sequence[int], limit: int, whole: bool = False) -> tuple[list[_PrefixNode], int]:
        """Return the nodes of the longest cached prefix, and how many of them its next token does not see."""
        nodes = self._walk(tokens, limit)
        first_visible = None if whole else self._first_visible
        while True:
            num_behind = first_visible(len(nodes) * self.page_size) // self.page_size if first_visible else 0
            gone = next((at for at in range(len(nodes) - 1, num_behind - 1, -1) if nodes[at].is_gone()), None)
            if gone is None:
                return nodes, num_behind
            del nodes[gone:]

    def _walk(self, tokens: Sequence[int], limit: int) -> list[_PrefixNode]:
        node, nodes = self._root, []
        for end in range(self.page_size, min(limit, len(tokens)) + 1, self.page_size):
            child = node.children.get(tuple(tokens[end - self.page_size : end]))
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def num_evictable_of(self, pages: Sequence[int]) -> int:
        """Count the evictable ones of these pages: referencing them leaves so many fewer available."""
        return sum(page in self._evictable for page in pages)

    def incref(self, pages: Sequence[int]) -> None:
        """Add a reference to each of these cached pages."""
        for page in pages:
            assert page in self._cached, f"page {page} is not cached"
            self._ref_counts[page] += 1
            self._evictable.pop(page, None)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` pages with one reference each, evicting as needed; None (and nothing changed) if not so
        many are available."""
        if count > self.num_available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def _evict(self) -> int:
        """Evict the least recently used page from the device; where all tokens are seen, of those without children
        there."""
        if self._first_visible is None:
            page = next(page for page in self._evictable if self._cached[page].is_last())
        else:
            page = next(iter(self._evictable))
        node = self._cached.pop(page)
        del self._evictable[page]
        self.num_evicted += 1
        host_page = self._allocate_host_page()
        node.page = -1
        if host_page is None:
            self._drop(node)
        else:
            self.pending_copies.append(PageCopy("out", page, host_page))
            node.host_page = host_page
            self._on_host[host_page] = node
        return page

    def _allocate_host_page(self) -> int | None:
        """Return a free host page, or that of the oldest node in host memory where none is free."""
        if not self._free_host_pages:
            windowed = self._first_visible is not None
            oldest = next((node for node in self._on_host.values() if windowed or not node.children), None)
            if oldest is not None:
                self._drop(oldest)
        return self._free_host_pages.pop() if self._free_host_pages else None

    def _drop(self, node: _PrefixNode) -> None:
        """Drop a node that is not on the device. Where all tokens are seen, its children in host memory are dropped
        too; else it stays in the tree while it has any."""
        falling = [node]
        while falling:
            gone = falling.pop()
            if self._first_visible is None:
                falling += gone.children.values()
            self._free_host_page(gone)
        if self._first_visible is None:
            node.children.clear()
        self._prune(node)

    def _free_host_page(self, node: _PrefixNode) -> None:
        """Free the host page of a node, if it has one."""
        if node.host_page >= 0:
            del self._on_host[node.host_page]
            self._free_host_pages.append(node.host_page)
            node.host_page = -1

    def _prune(self, node: _PrefixNode) -> None:
        """Remove a node that is gone and has no children, and those of its ancestors that are so then."""
        while node.parent is not None and node.is_gone() and not node.children:
            del node.parent.children[node.tokens]
            node = node.parent

    def insert_prefix(
        self, pages: list[int], tokens: Sequence[int], *, start: int, stop: int, replace: bool = True
    ) -> int:
        """Cache pages [start, stop) of the caller under the tokens there; those before start are cached already.

        Pages that the caller has released are -1. Where the tree already has a page with the same tokens, that one
        replaces the caller's own in `pages`, which becomes free; without replace (the caller's is still being written)
        caching ends before it. Returns up to where pages are cached now.
        """
        node = self._before(pages, tokens, start)
        for index in range(start, stop):
            part = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            child = node.children.get(part)
            page = pages[index]
            if child is None:
                child = _PrefixNode(page, part, node)
                node.children[part] = child
                if page >= 0:
                    self._cached[page] = child
            elif page < 0:
                pass  # the caller has released it
            elif child.page < 0:  # in host memory or dropped: the page here replaces it
                self._free_host_page(child)
                child.page = page
                self._cached[page] = child
            elif child.page != page:
                if not replace:
                    stop = index
                    break
                self.incref([child.page])
                self._decref_one(page)
                pages[index] = child.page
            node = child
        self._prune(node)
        return max(start, stop)

    def _before(self, pages: list[int], tokens: Sequence[int], start: int) -> _PrefixNode:
        """Return the node before the caller's page `start`."""
        if start and pages[start - 1] >= 0:
            return self._cached[pages[start - 1]]
        node = self._root
        for index in range(start):
            part = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            node = node.children.setdefault(part, _PrefixNode(-1, part, node))
        return node

    def decref(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page that is not -1. Cached pages without references become evictable, the last
        of a prompt first; others become free."""
        for page in reversed(pages):
            if page >= 0:
                self._decref_one(page)

    def _decref_one(self, page: int) -> None:
        assert self._ref_counts[page] > 0, f"page {page} has no reference"
        self._ref_counts[page] -= 1
        if self._ref_counts[page]:
            return
        if page in self._cached:
            self._evictable[page] = None
        else:
            self._free.append(page)

    def discard(self, pages: Sequence[int]) -> None:
        """Remove those of these pages that nobody holds from the prefix cache, and the pages after them, which were
        computed from theirs. A later page that a request still holds stays until it is released."""
        for page in pages:
            if page not in self._evictable:
                continue
            below = [self._cached[page]]
            for node in below:
                below += node.children.values()
            for node in reversed(below):
                if node.is_gone():
                    continue  # with what hung under it
                if node.page in self._evictable:
                    del self._evictable[node.page], self._cached[node.page]
                    self._free.append(node.page)
                    node.page = -1
                self._free_host_page(node)
                self._prune(node)

    def discard_prefix(self, tokens: Sequence[int]) -> None:
        """Remove the pages of a cached prefix of `tokens` that nobody holds, as `discard` does."""
        self.discard([node.page for node in self._walk(tokens, len(tokens)) if node.page >= 0])

    def check(self) -> None:
        """Assert that every page is free, evictable or referenced, and that the tree is whole. For tests."""
        assert len(set(self._free)) == len(self._free)
        for page in range(self.num_pages):
            free, evictable = page in set(self._free), page in self._evictable
            assert free + evictable + (self._ref_counts[page] > 0) == 1, page
            assert not (free and page in self._cached), page
            assert not evictable or page in self._cached, page
        assert len(self._free_host_pages) == len(set(self._free_host_pages))
        assert not set(self._free_host_pages) & set(self._on_host)
        for host_page, node in self._on_host.items():
            assert (node.page, node.host_page) == (-1, host_page)
            assert node.is_last() or self._first_visible is not None
        for page, node in self._cached.items():
            assert node.page == page
            assert node.host_page == -1
            if self._first_visible is None and self._ref_counts[page] and node.parent is not self._root:
                assert node.parent is not None
                assert self._ref_counts[node.parent.page] > 0  # a request references a whole prefix
        reached, num_nodes = [self._root], 0
        while reached:
            node = reached.pop()
            for tokens, child in node.children.items():
                assert child.parent is node
                assert child.tokens == tokens
                assert not child.is_gone() or (child.children and self._first_visible is not None)
                num_nodes += not child.is_gone()
                reached.append(child)
        assert num_nodes == len(self._cached) + len(self._on_host)

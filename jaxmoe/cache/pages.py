"""Page pool of one rank: reference counts, a prefix cache over full pages, LRU eviction, offload to host memory.

A page holds the keys and values of page_size consecutive tokens. A full page is *cached* once its tokens and all
earlier tokens are known. It becomes a node of a radix tree, a child of the page before it, and a later prompt with the
same prefix reuses it. A cached page that no request references is *evictable*: it stays until its memory is needed. The
pool evicts the least recently released page that has no children on the device.

If every layer has a sliding window or chunked attention, a running request releases the pages that its later tokens do
not see. They may be evicted before the pages that follow them. The tree retains the tokens of an evicted page, so that
its children still match: a prompt with that prefix needs only the pages that its next token sees.

With host pages, an evicted page is copied to host memory and stays in the tree. A prompt that matches it swaps it in.
`pending_copies` lists the copies in the order in which they must be made.

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
    """Describe a copy of one page between device and host memory: "out" to a host page, or "in" from a host page."""

    direction: Literal["out", "in"]
    page: int
    host_page: int


@dataclass(eq=False)
class _PrefixNode:
    """Represent a page in the radix tree of the prefix cache.

    The page is on the device (page >= 0) or in host memory (page -1, host_page >= 0). Both are -1 if the page was
    dropped while pages after it are still cached.
    """

    page: int
    tokens: Tokens
    parent: _PrefixNode | None
    children: dict[Tokens, _PrefixNode] = field(default_factory=dict)
    host_page: int = -1

    def is_last(self) -> bool:
        """Return whether no child is on the device."""
        return all(child.page < 0 for child in self.children.values())

    def is_gone(self) -> bool:
        """Return whether the page is neither on the device nor in host memory."""
        return self.page < 0 and self.host_page < 0


class PrefixMatch(NamedTuple):
    """Describe the longest cached prefix of a prompt.

    num_pages: pages of the prefix. num_behind: leading pages that the next token does not see because of a sliding
    window or chunked attention. on_device: the other pages, as far as they are on the device.
    """

    num_pages: int
    num_behind: int
    on_device: list[int]


class PagePool:
    """Manage num_pages device pages of page_size tokens and num_host_pages host pages, each numbered from 0.

    first_visible: maps a position to the first position that its token or any later token sees; None if tokens see all
    earlier ones. Raises: ValueError if num_pages or page_size is below 1.
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
        self.pending_copies: list[PageCopy] = []  # the owner of the pool removes and executes them in order
        self.num_evicted = self.num_swapped_in = 0

    @property
    def num_on_host(self) -> int:
        """Count the pages in host memory."""
        return len(self._on_host)

    @property
    def num_available(self) -> int:
        """Count the pages that can be allocated: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_in_use(self) -> int:
        """Count the pages that requests reference."""
        return self.num_pages - self.num_available

    def match_prefix(self, tokens: Sequence[int], *, limit: int, whole: bool = False) -> PrefixMatch:
        """Match the longest cached prefix of at most `limit` tokens. Adds no references.

        whole: require all pages of the prefix, including pages that the next token does not see.
        """
        nodes, num_behind = self._match(tokens, limit, whole)
        return PrefixMatch(len(nodes), num_behind, [node.page for node in nodes[num_behind:] if node.page >= 0])

    def acquire_prefix(self, tokens: Sequence[int], *, limit: int, whole: bool = False) -> list[int]:
        """Reference the prefix that match_prefix matches, and swap in its host pages.

        The caller must have checked that enough pages are available. Returns the pages in order, with -1 for each page
        that the next token does not see.
        """
        nodes, num_behind = self._match(tokens, limit, whole)
        seen = nodes[num_behind:]
        self.incref([node.page for node in seen if node.page >= 0])
        self._swap_in([node for node in seen if node.page < 0])
        return [-1] * num_behind + [node.page for node in seen]

    def _swap_in(self, nodes: Sequence[_PrefixNode]) -> None:
        """Allocate device pages for nodes in host memory and queue the copies. The pages are cached and referenced.

        Enough pages must be available.
        """
        for node in nodes:
            del self._on_host[node.host_page]  # before allocate, which may drop host pages
        for node in nodes:
            taken = self.allocate(1)
            assert taken is not None, "not enough pages available to swap in"
            self.pending_copies.append(PageCopy("in", taken[0], node.host_page))
            self._free_host_pages.append(node.host_page)
            node.page, node.host_page = taken[0], -1
            self._cached[node.page] = node
        self.num_swapped_in += len(nodes)

    def _match(self, tokens: Sequence[int], limit: int, whole: bool = False) -> tuple[list[_PrefixNode], int]:
        """Return the nodes of the longest cached prefix and the number of leading nodes its next token does not see."""
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
        """Count the evictable pages among `pages`. Referencing them reduces num_available by this number."""
        return sum(page in self._evictable for page in pages)

    def incref(self, pages: Sequence[int]) -> None:
        """Add a reference to each of `pages`, which must be cached."""
        for page in pages:
            assert page in self._cached, f"page {page} is not cached"
            self._ref_counts[page] += 1
            self._evictable.pop(page, None)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` pages with one reference each, and evict pages as needed.

        Returns None and changes no state if fewer pages are available.
        """
        if count > self.num_available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def _evict(self) -> int:
        """Evict the least recently used evictable page from the device and return it.

        Without first_visible, only a page without children on the device is evicted.
        """
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
        """Return a free host page. If all are in use, drop the oldest node in host memory first."""
        if not self._free_host_pages:
            windowed = self._first_visible is not None
            oldest = next((node for node in self._on_host.values() if windowed or not node.children), None)
            if oldest is not None:
                self._drop(oldest)
        return self._free_host_pages.pop() if self._free_host_pages else None

    def _drop(self, node: _PrefixNode) -> None:
        """Drop a node that is not on the device.

        Without first_visible, its children in host memory are dropped, too. Otherwise the node stays in the tree while
        it has children.
        """
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
        """Remove a node that is gone and has no children, and then its ancestors as long as the same holds for them."""
        while node.parent is not None and node.is_gone() and not node.children:
            del node.parent.children[node.tokens]
            node = node.parent

    def insert_prefix(
        self, pages: list[int], tokens: Sequence[int], *, start: int, stop: int, replace: bool = True
    ) -> int:
        """Insert pages [start, stop) of the caller into the prefix cache under their tokens.

        Pages before start are cached already. Pages that the caller has released are -1. If the tree already has a page
        with the same tokens, it replaces the caller's page in `pages`, and the caller's page becomes free. Without
        replace (the caller's page is still being written), insertion stops before that page. Returns the end of the
        cached range.
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
            elif child.page < 0:  # in host memory or dropped: the caller's page replaces it
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
        """Return the tree node of the caller's page start - 1, or the root if start is 0."""
        if start and pages[start - 1] >= 0:
            return self._cached[pages[start - 1]]
        node = self._root
        for index in range(start):
            part = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            node = node.children.setdefault(part, _PrefixNode(-1, part, node))
        return node

    def decref(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page that is not -1.

        Cached pages without references become evictable, the last page of a prompt first in line. Other pages without
        references become free.
        """
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
        """Remove unreferenced pages among `pages` from the prefix cache, and the pages computed after them.

        A later page that a request still references stays until it is released.
        """
        for page in pages:
            if page not in self._evictable:
                continue
            below = [self._cached[page]]
            for node in below:
                below += node.children.values()
            for node in reversed(below):
                if node.is_gone():
                    continue  # removed together with its children
                if node.page in self._evictable:
                    del self._evictable[node.page], self._cached[node.page]
                    self._free.append(node.page)
                    node.page = -1
                self._free_host_page(node)
                self._prune(node)

    def discard_prefix(self, tokens: Sequence[int]) -> None:
        """Remove the unreferenced pages of a cached prefix of `tokens`, as `discard` does."""
        self.discard([node.page for node in self._walk(tokens, len(tokens)) if node.page >= 0])

    def check(self) -> None:
        """Assert that every page is free, evictable or referenced, and that the tree is consistent. For tests."""
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

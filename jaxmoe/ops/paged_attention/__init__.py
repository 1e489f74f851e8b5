"""Attention of new tokens over the pages of the KV cache, and the pages."""

from jaxmoe.ops.paged_attention.api import paged_attention
from jaxmoe.ops.paged_attention.backends import BACKENDS, PagedBackend
from jaxmoe.ops.paged_attention.loop import merge_attention, partial_attention
from jaxmoe.ops.paged_attention.pages import ContextShard, Pages, write_pages

__all__ = [
    "BACKENDS",
    "ContextShard",
    "PagedBackend",
    "Pages",
    "merge_attention",
    "paged_attention",
    "partial_attention",
    "write_pages",
]

"""Backends of paged attention.

- loop: loops over groups of pages with an online softmax, as often as the longest row needs. Any platform.
- native: a C++ kernel for CPUs that reads only each row's own pages (ops/native; needs a compiler).
"""

from __future__ import annotations

from typing import Literal

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.paged_attention import loop, native

PagedBackend = Literal["loop", "native"]
BACKENDS = backends_by_name(
    KernelBackend(op="attention", name="loop", kernels={"paged_attention": loop.paged_attention}),
    KernelBackend(
        op="attention", name="native", kernels={"paged_attention": native.paged_attention}, is_native=True,
        is_opaque=True, reads_page_shards=False,
    ),
)  # fmt: skip

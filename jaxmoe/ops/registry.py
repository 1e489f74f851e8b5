"""The kernel registry: the backends of every op, what each can read, and why one cannot run.

All backends of an op compute the same result. tests/ops/test_parity.py compares every entry with the reference of its
op.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxmoe.ops import dispatch, grouped_matmul, linear, paged_attention, pointwise, sampling
from jaxmoe.ops.backend import KernelBackend

REGISTRY: Mapping[str, Mapping[str, KernelBackend]] = {
    "dispatch": dispatch.BACKENDS,
    "grouped": grouped_matmul.BACKENDS,
    "linear": linear.BACKENDS,
    "attention": paged_attention.BACKENDS,
    "pointwise": pointwise.BACKENDS,
    "sampling": sampling.BACKENDS,
}

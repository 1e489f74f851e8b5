"""Backends of sampling.

- xla: runs on any platform; skips features that no row uses.
- native: a C++ kernel for CPUs (ops/native; needs a compiler); programs with it compile in half the time.
"""

from __future__ import annotations

from typing import Literal

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.sampling import native, xla

SamplingBackend = Literal["xla", "native"]
BACKENDS = backends_by_name(
    KernelBackend(op="sampling", name="xla", kernels={"sample": xla.sample}),
    KernelBackend(op="sampling", name="native", kernels={"sample": native.sample}, is_native=True, is_opaque=True),
)

"""Backends of row-wise operations between matmuls: norm, RoPE, routing, activation.

xla runs on any platform. native is a C++ kernel for CPUs. The native result for a row is bitwise independent of the
other rows. XLA's may differ in the last bits: its vector code for a strip of rows and its scalar code for the rest
round exponentials differently.
"""

from __future__ import annotations

from typing import Literal

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.pointwise import native, xla

PointwiseBackend = Literal["xla", "native"]
_FUNCTIONS = ("rms_norm", "sum_of_squares", "scale_by_rms", "rotate", "gated_unit", "gated_rows", "route")
BACKENDS = backends_by_name(
    KernelBackend(op="pointwise", name="xla", kernels={name: getattr(xla, name) for name in _FUNCTIONS}),
    KernelBackend(
        op="pointwise", name="native", kernels={name: getattr(native, name) for name in _FUNCTIONS}, is_native=True,
        is_opaque=True,
    ),
)  # fmt: skip

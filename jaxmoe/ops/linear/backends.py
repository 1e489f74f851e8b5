"""Backends of linear layers.

- xla: XLA's matmul. Any platform, any dtype.
- native: a C++ kernel for CPUs (ops/native; needs a compiler). It reads the matrix at memory bandwidth for few tokens,
  and a token's result does not depend on other tokens. Falls back to xla for gradients, and for many tokens if the
  processor multiplies bfloat16 in hardware.
"""

from __future__ import annotations

from typing import Literal

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.linear import native, xla

LinearBackend = Literal["xla", "native"]
BACKENDS = backends_by_name(
    KernelBackend(op="linear", name="xla", kernels={"linear": xla.linear}),
    KernelBackend(
        op="linear", name="native", kernels={"linear": native.linear}, is_native=True, is_opaque=True,
        reads_quantized=False,
    ),
)  # fmt: skip

"""Backends of the grouped experts.

- blocks: sorts tokens by expert and cuts them in blocks of rows of one expert. Weights are read in place, and experts
  without tokens are never read. Any platform.
- ragged: `jax.lax.ragged_dot`, a kernel on TPU. Copies a layer's experts out of the stack of layers. On CPU and with
  the stock GPU lowering it costs num_experts times as much.
- native: a C++ kernel for CPUs (ops/native; needs a compiler). It reads weights at memory bandwidth for few tokens, and
  a token's result does not depend on other tokens. Falls back to blocks for gradients, and for many tokens if the
  processor multiplies bfloat16 in hardware.
- dense: applies every expert to every token.

For quantized weights, blocks dequantizes a few columns of one expert at a time (ops/quantized_matmul); ragged and
dense dequantize a whole layer at once.
"""

from __future__ import annotations

from typing import Literal

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.grouped_matmul import blocks, dense, native, ragged

GroupedBackend = Literal["blocks", "ragged", "native", "dense"]
BACKENDS = backends_by_name(
    KernelBackend(op="grouped", name="blocks", kernels={"grouped_swiglu": blocks.grouped_swiglu}),
    KernelBackend(op="grouped", name="ragged", kernels={"grouped_swiglu": ragged.grouped_swiglu}),
    KernelBackend(
        op="grouped", name="native", kernels={"grouped_swiglu": native.grouped_swiglu}, is_native=True, is_opaque=True,
        reads_quantized=False,
    ),
    KernelBackend(op="grouped", name="dense", kernels={"grouped_swiglu": dense.grouped_swiglu}),
)  # fmt: skip

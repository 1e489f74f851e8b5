"""Backends of row-wise operations between matmuls: norm, RoPE, routing, activation.

xla runs on any platform. native is a C++ kernel for CPUs. The native result for a row is bitwise independent of the
other rows. XLA's may differ in the last bits: its vector code for a strip of rows and its scalar code for the rest
round exponentials differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import jax

PointwiseBackend = Literal["xla", "native"]
POINTWISE_BACKENDS: tuple[PointwiseBackend, ...] = ("xla", "native")


def differentiated_as(xla: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a native op so that its gradients are computed by `xla`, a function of the same arguments."""

    def decorate(native: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(native)
        def both(*arrays: jax.Array, **options: Any) -> Any:
            run = jax.custom_vjp(lambda *arrays: native(*arrays, **options))
            run.defvjp(
                lambda *arrays: (native(*arrays, **options), arrays),
                lambda arrays, cotangent: jax.vjp(lambda *a: xla(*a, **options), *arrays)[1](cotangent),
            )
            return run(*arrays)

        return both

    return decorate

"""What stands between products and is computed row by row: by XLA, or on the CPU by a C++ kernel.

The kernel's result for a row does not depend on the rows beside it, to the last bit. XLA's may: its vector code for a
strip of rows and its scalar code for the rest round exponentials differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import jax

PointwiseBackend = Literal["xla", "native"]
POINTWISE_BACKENDS: tuple[PointwiseBackend, ...] = ("xla", "native")


def differentiated_as(xla: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a native form, so that its gradients are those of `xla`, which takes the same arguments."""

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

"""Row-wise operations by C++ kernels for CPUs (ops/native/pointwise.cc). Gradients are those of XLA's operations.

Arrays are bfloat16 or float32.
"""

# Dims: T tokens, D width, N heads, H head dim, F columns of an expert or MLP, E experts.
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ops.pointwise import xla


def differentiated_as(reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a native op so that its gradients are computed by `reference`, a function of the same arguments."""

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kernel)
        def both(*arrays: jax.Array, **options: Any) -> Any:
            run = jax.custom_vjp(lambda *arrays: kernel(*arrays, **options))
            run.defvjp(
                lambda *arrays: (kernel(*arrays, **options), arrays),
                lambda arrays, cotangent: jax.vjp(lambda *a: reference(*a, **options), *arrays)[1](cotangent),
            )
            return run(*arrays)

        return both

    return decorate


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _rows(x):
    """Reshape x [B,S,...] to one row [T,D] per token."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


@differentiated_as(xla.rms_norm)
def rms_norm(x, weight, *, eps):
    rows = x.reshape(-1, x.shape[-1])
    return jax.ffi.ffi_call("jaxmoe_norm", _like(rows))(rows, weight, eps=np.float32(eps)).reshape(x.shape)


@differentiated_as(xla.sum_of_squares)
def sum_of_squares(x):
    rows = _rows(x)
    return jax.ffi.ffi_call("jaxmoe_squares", jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32))(rows).reshape(
        x.shape[:2]
    )


@differentiated_as(xla.scale_by_rms)
def scale_by_rms(x, weight, mean_square, *, eps):
    rows = _rows(x)
    call = jax.ffi.ffi_call("jaxmoe_scaled", _like(rows))
    return call(rows, weight.reshape(-1), mean_square.reshape(-1), eps=np.float32(eps)).reshape(x.shape)


@differentiated_as(xla.rotate)
def rotate(x, cos, sin):
    """Pass x [T,N,H], cos and sin [T,H/2] to the kernel."""
    half = cos.shape[-1]
    rows = x.reshape(cos.size // half, -1, 2 * half)
    y = jax.ffi.ffi_call("jaxmoe_rotate", _like(rows))(rows, cos.reshape(-1, half), sin.reshape(-1, half))
    return y.reshape(x.shape)


@differentiated_as(xla.gated_unit)
def gated_unit(gate, up):
    return jax.ffi.ffi_call("jaxmoe_gated_unit", _like(gate))(gate, up)


@differentiated_as(xla.gated_rows)
def gated_rows(x, gates):
    return jax.ffi.ffi_call("jaxmoe_gated_rows", _like(x))(x, gates)


@differentiated_as(xla.route)
def route(logits, valid, bias, *, rule):
    call = jax.ffi.ffi_call("jaxmoe_route", (_like(logits), _like(logits)))
    names = ("top_k", "normalize", "num_groups", "top_groups")
    numbers = {name: np.int64(getattr(rule, name)) for name in names}
    numbers |= dict(best=np.int64(rule.experts_per_group_score), sigmoid=np.int64(rule.scoring == "sigmoid"))
    numbers["by_logits"] = np.int64(rule.top_k_of == "logits")
    own = jnp.zeros(0) if bias is None else bias.astype(jnp.float32)
    weights, scores = call(logits, valid, own, scaling=np.float32(rule.scaling), **numbers)
    return weights, scores

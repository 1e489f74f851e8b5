"""Benchmark programs: one collective, matmul or pass over memory, repeated in a loop.

Every iteration reads a number that the previous one wrote. So the compiler can neither remove iterations nor run them
early or at the same time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.planner.hardware import MeasuredOp

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_ROW = 1024  # message elements per row, as in activations
# Small messages need many iterations to hide the cost of a call, large ones some to hide that of its fresh memory.
_MIN_ITERATIONS, _MAX_ITERATIONS, _ITERATIONS_BYTES = 8, 256, 32 << 20


def num_iterations(num_bytes: int) -> int:
    """Return the loop iterations for a message size: the smaller the message, the more."""
    return max(_MIN_ITERATIONS, min(_MAX_ITERATIONS, _ITERATIONS_BYTES // num_bytes))


def median_seconds(program: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    """Return the median seconds of a call until its result is ready. Each call takes the previous result.

    A first call warms up and is not counted.
    """
    argument = jax.block_until_ready(program(argument))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        argument = jax.block_until_ready(program(argument))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def message_dtype(mesh: Mesh) -> Any:
    """Return the dtype of messages: bfloat16, but float32 on a CPU, because XLA:CPU sends other dtypes as float32."""
    return jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16


def message_bytes(least: int, ranks: int, mesh: Mesh) -> int:
    """Round `least` bytes up so that the elements split evenly over ranks."""
    share = ranks * jnp.dtype(message_dtype(mesh)).itemsize
    return -(-least // share) * share


def expected(op: MeasuredOp, axis: str, num_bytes: int, ranks: int) -> CollectiveOp:
    """Return the only collective that a program of collective_program may contain."""
    result = num_bytes // ranks if op == "reduce-scatter" else num_bytes
    return CollectiveOp(op=op, axes=(axis,), result_bytes=result)


def collective_program(op: MeasuredOp, axis: str, num_bytes: int, mesh: Mesh, iterations: int) -> tuple[Any, jax.Array]:
    """Compile a loop of collectives along an axis, in all groups of the mesh at once. Return it with its argument.

    num_bytes: size of the whole message, which is the buffer of an all-reduce, the result of an all-gather, the operand
    of a reduce-scatter or all-to-all on one rank, or the bytes that one permute sends.
    """
    ranks, dtype = mesh.shape[axis], message_dtype(mesh)
    numbers = num_bytes // jnp.dtype(dtype).itemsize
    width = math.gcd(numbers // ranks, _ROW)
    held = numbers // ranks if op == "all-gather" else numbers
    send: dict[str, Callable[[jax.Array], jax.Array]] = {
        "all-reduce": lambda x: lax.psum(x, axis),
        "all-gather": lambda x: lax.all_gather(x, axis, tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, axis, tiled=True),
        "all-to-all": lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, axis, [(at, (at + 1) % ranks) for at in range(ranks)]),
    }

    def body(_: Any, x: jax.Array) -> jax.Array:
        return x.at[0, 0].set(send[op](x)[-1, -1])  # the next message depends on the end of this one

    return _compiled(lambda x: lax.fori_loop(0, iterations, body, x), mesh, (held // width, width), dtype)


def differing(program: Any, wanted: CollectiveOp, iterations: int, mesh: Mesh) -> str:
    """Describe the collectives of a compiled program if they differ from `iterations` wanted ones; else return ""."""
    compiled = collectives(program.as_text(), mesh)
    if compiled == {wanted: iterations}:
        return ""
    return (
        ", ".join(f"{count} {one.op} of {one.result_bytes} bytes" for one, count in compiled.items()) or "no collective"
    )


def product_program(dtype: str, width: int, mesh: Mesh, iterations: int) -> tuple[Any, jax.Array]:
    """Compile a loop of width x width matmuls of the previous result on every device. Return it with its argument."""
    kind = DTYPES[dtype]
    total = jnp.int32 if kind == jnp.int8 else jnp.float32

    def local(x: jax.Array) -> jax.Array:
        def body(_: Any, held: jax.Array) -> jax.Array:
            return jnp.dot(held, x, preferred_element_type=total).astype(kind)

        return lax.fori_loop(0, iterations, body, x)

    return _compiled(local, mesh, (width, width), kind, products=True)


def memory_program(num_bytes: int, mesh: Mesh, iterations: int) -> tuple[Any, jax.Array]:
    """Compile a loop in which every device reads and writes num_bytes. Return it with its argument."""
    return _compiled(
        lambda x: lax.fori_loop(0, iterations, lambda _, held: held * 0.5 + 1, x), mesh, (num_bytes // 4,), jnp.float32
    )


def _compiled(
    local: Callable[[jax.Array], jax.Array], mesh: Mesh, shape: tuple[int, ...], dtype: Any, *, products: bool = False
) -> Any:
    """Compile `local` on every device, and create its argument of that shape per device, which it takes and returns."""
    spec = P(mesh.axis_names)
    sharding = NamedSharding(mesh, spec)
    whole = (shape[0] * mesh.size, *shape[1:])

    def fill() -> jax.Array:
        if not products:
            return jnp.full(whole, 0.5, dtype)
        scale = 3.0 if dtype == jnp.int8 else (3 / shape[-1]) ** 0.5  # keeps repeated matmuls at the same magnitude
        return (jax.random.uniform(jax.random.key(0), whole, jnp.float32, -1.0, 1.0) * scale).astype(dtype)

    argument = jax.jit(fill, out_shardings=sharding)()
    shared = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(shared, donate_argnums=0).lower(argument).compile(), argument

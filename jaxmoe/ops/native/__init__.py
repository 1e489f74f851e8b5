"""Native CPU kernels: compiled once on the user's machine by its C++ compiler, cached, and called through XLA's FFI."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import SwiGLUClamp
from jaxmoe.errors import ConfigError
from jaxmoe.ops.stack import LayerIndex

DTYPES = ("bfloat16", "float32")

_FEW_TOKENS = 64
_HERE = Path(__file__).parent
_UNIT = _HERE / "kernels.cc"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_REMEDY = "use grouped='blocks', linear='xla', attention='loop', pointwise='xla' and sampling='xla'"
_TARGETS = {
    "jaxmoe_experts": "JaxmoeExperts",
    "jaxmoe_linear": "JaxmoeLinear",
    "jaxmoe_paged": "JaxmoePaged",
    "jaxmoe_norm": "JaxmoeNorm",
    "jaxmoe_squares": "JaxmoeSquares",
    "jaxmoe_scaled": "JaxmoeScaled",
    "jaxmoe_rotate": "JaxmoeRotate",
    "jaxmoe_gated_unit": "JaxmoeGatedUnit",
    "jaxmoe_gated_rows": "JaxmoeGatedRows",
    "jaxmoe_route": "JaxmoeRoute",
    "jaxmoe_sample": "JaxmoeSample",
}


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None: $CXX if set, else the first of g++, clang++, c++ on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _cache_path(compiler: str) -> Path:
    """Return the cache path of the library, which depends on sources, flags, compiler, processor and JAX version."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    texts = [path.read_text() for path in sorted((*_HERE.glob("*.cc"), *_HERE.glob("*.h")))]
    facts = (*texts, version, platform.machine(), flags, jax.__version__, *_FLAGS)
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxmoe" / "native" / f"kernels-{digest}.so"


def _build(compiler: str, path: Path) -> None:
    """Compile the library to a temporary file and rename it to path, so that path is never incomplete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".so")
    except OSError as error:
        raise ConfigError(
            f"native kernels cannot be cached in {path.parent}: {error}; set XDG_CACHE_HOME to a writable folder"
        ) from error
    os.close(handle)
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_UNIT), "-o", partial]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        os.unlink(partial)
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise ConfigError(f"native kernels could not be compiled by {compiler}: {lines[0][:200]}; {_REMEDY}")
    os.replace(partial, path)


def check(dtype: str, *, option: str) -> str:
    """Check that native kernels can be used and return the path of the C++ compiler. Compiles and writes nothing.

    option: name of the option that selected the native backend, for error messages.
    Raises: ConfigError if dtype is not bfloat16 or float32, if JAX does not run on the CPU, or if no compiler is found.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"{option}='native' computes in bfloat16 or float32, not {dtype}; {_REMEDY}")
    if jax.default_backend() != "cpu":
        raise ConfigError(f"native kernels run on the CPU only, but JAX runs on {jax.default_backend()}; {_REMEDY}")
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError(
            f"native kernels need a C++ compiler, but no g++, clang++, c++ or $CXX was found: install one, or {_REMEDY}"
        )
    return compiler


def prepare(dtype: str, *, option: str = "grouped") -> None:
    """Compile the kernels if they are not cached on this machine, and register them for arrays of dtype.

    Raises: ConfigError as check does, and if the compiler fails or its library cannot be cached or loaded.
    """
    _register(check(dtype, option=option))


def max_tokens(dtype: str) -> int:
    """Return the largest number of tokens for which the kernels are faster than XLA. Call prepare() first.

    It is small for bfloat16 if the processor multiplies bfloat16 in hardware: XLA uses that for many tokens, while the
    kernels widen to float32.
    """
    library = _register(check(dtype, option="native"))
    return _FEW_TOKENS if dtype == "bfloat16" and library.JaxmoeMultipliesBfloat16() else sys.maxsize


@cache
def _register(compiler: str) -> ctypes.CDLL:
    """Load the library, compile it first if needed, and register its kernels with JAX."""
    path = _cache_path(compiler)
    if not path.exists():
        _build(compiler, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # the cached file is corrupt: compile it again
        _build(compiler, path)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ConfigError(
                f"native kernels cannot be loaded from {path}: {error}; set XDG_CACHE_HOME to a folder from which "
                f"libraries can be loaded, or {_REMEDY}"
            ) from error
    for target, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return library


def native_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T E"],
    gate_up: Float[Array, "L E 2 D F"],
    down: Float[Array, "L E F D"],
    bias: Float[Array, "L E 2 F"] | None,
    layer: LayerIndex,
    *,
    clamp: SwiGLUClamp | None,
) -> Float[Array, "T D"]:
    """Compute ops.grouped's blocks natively. bfloat16 or float32; call prepare() first."""
    call = jax.ffi.ffi_call("jaxmoe_experts", jax.ShapeDtypeStruct(x.shape, x.dtype))
    own = jnp.zeros((0, 0), x.dtype) if bias is None else bias
    limits = dict(limit=np.float32(clamp.limit if clamp else 0), alpha=np.float32(clamp.alpha if clamp else 1))
    return call(x, weights.astype(jnp.float32), gate_up, down, own, jnp.int32(layer), **limits)


def native_linear(
    x: Float[Array, "T K"],
    w: Float[Array, "L K N"] | Float[Array, "L N K"],
    layer: LayerIndex,
    num_valid: int | jax.Array,
    *,
    transposed: bool,
    dtype: str,
) -> Float[Array, "T N"]:
    """Compute ops.linear's xla natively. Call prepare() first.

    x and w are bfloat16 or float32. dtype: of the result; bfloat16 inputs give bfloat16 or float32, float32 inputs
    float32.
    """
    columns = w.shape[1 if transposed else 2]
    call = jax.ffi.ffi_call("jaxmoe_linear", jax.ShapeDtypeStruct((x.shape[0], columns), jnp.dtype(dtype)))
    return call(x, w, jnp.int32(layer), jnp.int32(num_valid), transposed=transposed)


def native_paged(
    q: Float[Array, "N Q K G H"],
    pages: tuple[Array, ...],
    block_table: Int[Array, "N P"],
    positions: Int[Array, "N"],
    query_lens: Int[Array, "N"],
    layer: LayerIndex,
    sinks: Float[Array, "K G"] | None,
    *,
    mask_spec: Any,
    value_dim: int | None,
) -> Float[Array, "N Q K G V"]:
    """Compute ops.paged's loop natively. Call prepare() first.

    q is bfloat16 or float32; pages are bfloat16, float32, int8 or float8_e4m3fn.
    """
    block_metadata = (block_table, positions, query_lens, jnp.int32(layer))
    dim = pages[1].shape[4] if value_dim is None else value_dim
    cache = (pages[0], *pages) if value_dim is not None else pages  # latent: values are the keys, with the same scale
    cache = (*cache, cache[2]) if len(cache) == 3 else cache
    cache = cache if len(cache) == 4 else (*cache, jnp.zeros(0), jnp.zeros(0))
    own = jnp.zeros((0, 0)) if sinks is None else sinks.astype(jnp.float32)
    call = jax.ffi.ffi_call("jaxmoe_paged", jax.ShapeDtypeStruct((*q.shape[:-1], dim), q.dtype))
    limits = dict(window=np.int64(mask_spec.window or 0), chunk=np.int64(mask_spec.chunk or 0), value_dim=np.int64(dim))
    return call(q, *cache, *block_metadata, own, scale=np.float32(mask_spec.scale), **limits)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def native_norm(x: Float[Array, "T D"], weight: Float[Array, "D"], *, eps: float) -> Float[Array, "T D"]:
    """Compute ops.norm.rms_norm's xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_norm", _like(x))(x, weight, eps=np.float32(eps))


def native_squares(x: Float[Array, "T D"]) -> Float[Array, "T"]:
    """Compute ops.norm.sum_of_squares' xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_squares", jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))(x)


def native_scaled(
    x: Float[Array, "T D"], weight: Float[Array, "D"], mean_square: Float[Array, "T"], *, eps: float
) -> Float[Array, "T D"]:
    """Compute ops.norm.scale_by_rms' xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_scaled", _like(x))(x, weight, mean_square, eps=np.float32(eps))


def native_rotate(
    x: Float[Array, "T N H"], cos: Float[Array, "T H/2"], sin: Float[Array, "T H/2"]
) -> Float[Array, "T N H"]:
    """Compute ops.rope.rotate's xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_rotate", _like(x))(x, cos, sin)


def native_gated_unit(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """Compute ops.gate.gated_unit's xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_gated_unit", _like(gate))(gate, up)


def native_gated_rows(x: Float[Array, "T D"], gates: Float[Array, "T 1"]) -> Float[Array, "T D"]:
    """Compute ops.gate.gated_rows' xla natively. bfloat16 or float32; call prepare() first."""
    return jax.ffi.ffi_call("jaxmoe_gated_rows", _like(x))(x, gates)


def native_route(
    logits: Float[Array, "T E"], valid: Bool[Array, "T"], bias: Float[Array, "E"] | None, *, rule: Any
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Compute ops.route's xla natively. Call prepare() first."""
    call = jax.ffi.ffi_call("jaxmoe_route", (_like(logits), _like(logits)))
    names = ("top_k", "normalize", "num_groups", "top_groups")
    numbers = {name: np.int64(getattr(rule, name)) for name in names}
    numbers |= dict(best=np.int64(rule.experts_per_group_score), sigmoid=np.int64(rule.scoring == "sigmoid"))
    numbers["by_logits"] = np.int64(rule.top_k_of == "logits")
    own = jnp.zeros(0) if bias is None else bias.astype(jnp.float32)
    weights, scores = call(logits, valid, own, scaling=np.float32(rule.scaling), **numbers)
    return weights, scores


def native_sample(
    logits: Float[Array, "B V"],
    token_pages: Int[Array, "M S"],
    block_table: Int[Array, "B P"],
    positions: Int[Array, "B"],
    features: Bool[Array, "4"],
    rows: Sequence[Array],
    *,
    num_top: int,
) -> tuple[Int[Array, "B"], Float[Array, "B"], Int[Array, "B T"], Float[Array, "B T"]]:
    """Compute ops.sample's xla natively. rows: the fields of SamplingArrays in order. Call prepare() first."""
    count = len(logits)
    one, many = (count,), (count, num_top)
    results = tuple(jax.ShapeDtypeStruct(shape, t) for shape in (one, many) for t in (jnp.int32, jnp.float32))
    call = jax.ffi.ffi_call("jaxmoe_sample", results)
    tokens, logprobs, top_tokens, top_logprobs = call(logits, token_pages, block_table, positions, features, *rows)
    return tokens, logprobs, top_tokens, top_logprobs

"""The CPU kernel for few tokens, compiled on the user's machine by the C++ compiler it finds there, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.errors import ConfigError

_SOURCE = Path(__file__).parent / "experts.cc"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_TARGET = "jaxmoe_experts"


def find_compiler() -> str | None:
    """Path of a C++ compiler: that of the variable CXX, else g++, clang++ or c++ on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _cache_path(compiler: str) -> Path:
    """Where the library for this source, compiler and processor is kept."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    facts = (_SOURCE.read_text(), version, platform.machine(), flags, jax.__version__, *_FLAGS)
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxmoe" / "native" / f"experts-{digest}.so"


def _build(compiler: str, path: Path) -> None:
    """Compile to a file beside path and rename, so that a library is there whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".so")
    except OSError as error:
        raise ConfigError(
            f"grouped='native' keeps its library in {path.parent}: {error}; set XDG_CACHE_HOME"
        ) from error
    os.close(handle)
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", partial]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        os.unlink(partial)
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise ConfigError(
            f"grouped='native' could not be compiled by {compiler}: {lines[0][:200]}; use grouped='blocks'"
        )
    os.replace(partial, path)


def prepare(dtype: str) -> None:
    """Compile (once a machine) and register the kernel, for arrays of dtype.

    Raises: ConfigError for another dtype than bfloat16 and float32, where JAX does not run on the CPU, or where no C++
    compiler is found or it fails.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"grouped='native' computes in bfloat16 or float32, not {dtype}; use grouped='blocks'")
    _register()


@cache
def _register() -> None:
    if jax.default_backend() != "cpu":
        raise ConfigError(
            f"grouped='native' runs on the CPU and JAX is on {jax.default_backend()}; use grouped='blocks'"
        )
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError("grouped='native' needs a C++ compiler (g++ or clang++, or CXX) and none was found")
    path = _cache_path(compiler)
    if not path.exists():
        _build(compiler, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not a library (any more): once more from the source
        _build(compiler, path)
        library = ctypes.CDLL(str(path))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.JaxmoeExperts), platform="cpu")


def native_experts(
    x: Float[Array, "T D"],
    tokens: Int[Array, "A"],
    weights: Float[Array, "A"],
    ends: Int[Array, "E"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """As ops.grouped's blocks, for assignments sorted by expert. bfloat16 or float32; call prepare() first."""
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, tokens, weights.astype(jnp.float32), ends, gate_up, down)

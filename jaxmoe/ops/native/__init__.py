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
from functools import cache
from pathlib import Path

import jax

from jaxmoe.errors import ConfigError

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

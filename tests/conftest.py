"""Eight emulated devices, set before any backend starts; checkpoints and loaded models shared by the whole run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import pytest

# LLVM's optimizations take half of the time to compile and change no test's meaning: shapes here are tiny. What they
# could break is looked at by `make test` once more: tests marked `optimized`, as users run the program.
if "JAXMOE_TESTS_OPTIMIZED" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(__file__).parent.parent / ".cache" / "tests"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

from jaxmoe import LLM  # noqa: E402
from jaxmoe.model.kernels import NATIVE_OPS, KernelConfig  # noqa: E402
from jaxmoe.ops.grouped_matmul import blocks  # noqa: E402
from jaxmoe.parallel.mesh import build_mesh, parse_mesh  # noqa: E402

from .tiny.cases import CASES_BY_NAME  # noqa: E402
from .tiny.checkpoint import write_checkpoint  # noqa: E402

ONE_DEVICE = "data=1"
NATIVE = KernelConfig(**dict.fromkeys(NATIVE_OPS, "native"))
XLA = KernelConfig()  # what runs on accelerators; a CPU without a C++ compiler runs the same with layers="unroll"
MESHES_OF_8 = tuple(
    f"data={data},tensor={tensor},expert={8 // data // tensor}"
    for data in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if 8 % (data * tensor) == 0
)


def mesh_of(text: str) -> jax.sharding.Mesh:
    """A mesh over the first devices, as many as it needs."""
    axes = parse_mesh(text)
    count = 1
    for size in axes.values():
        count *= size
    return build_mesh(axes, jax.devices()[:count])


@pytest.fixture
def few_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes of expert blocks in place of up to seven, for tests whose subject is elsewhere."""
    monkeypatch.setattr(blocks, "_SIZES", {1 << 62: (1, 8)})


@pytest.fixture(scope="session")
def tiny_dir() -> Callable[[str], Path]:
    """name of a case -> its checkpoint directory, written once."""
    root = Path(tempfile.mkdtemp(prefix="jaxmoe-tiny-"))

    @cache
    def directory(name: str) -> Path:
        return write_checkpoint(CASES_BY_NAME[name], root / name)

    return directory


@pytest.fixture(scope="session")
def changed_dir() -> Callable[..., Path]:
    """(name of a case, keys of its config.json) -> a checkpoint of the case with these keys, written once."""
    root = Path(tempfile.mkdtemp(prefix="jaxmoe-changed-"))

    @cache
    def directory(name: str, **keys: Any) -> Path:
        case = CASES_BY_NAME[name]
        keys = {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}
        return write_checkpoint(replace(case, config=case.config | keys), Path(tempfile.mkdtemp(dir=root)))

    return directory


@pytest.fixture(scope="session")
def tiny_llm(tiny_dir: Callable[[str], Path]) -> Callable[..., LLM]:
    """(name of a case, mesh, kernels) -> the model loaded in float32, shared between tests that follow each other.

    kernels: None for what a user gets who names none.
    """

    @lru_cache(maxsize=4)
    def load(name: str, mesh: str = ONE_DEVICE, kernels: KernelConfig | None = None) -> LLM:
        return LLM.load(tiny_dir(name), mesh=mesh_of(mesh), dtype="float32", kernels=kernels or {})

    return load

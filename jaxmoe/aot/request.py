"""Request to inspect a model without its weights: config.json, mesh and workload, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from jax.sharding import Mesh

from jaxmoe.aot.compile import abstract_runner
from jaxmoe.config import ModelConfig
from jaxmoe.config.engine import CHUNK_TOKENS, PAGE_SIZE
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.errors import ConfigError
from jaxmoe.families.dtypes import canonical, choose_dtypes, kv_array_dtype
from jaxmoe.model.kernels import KernelConfig, choose_kernels
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import check_virtual_stages, layer_segments
from jaxmoe.weights.source import find_config
from jaxmoe.weights.stored import read_stored_config

_MAX_COUNT = 1 << 20  # largest max_num_seqs and chunk_tokens


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """Describe a model on a mesh, and the requests to serve.

    config: a config.json, a folder that holds one, or a preset. max_num_seqs: concurrent requests over all ranks.
    context: tokens per request. dtype, weights_dtype, kv_dtype, layout, virtual_stages: as in LLM.load. chunk_tokens:
    as in AsyncEngine.
    """

    config: str
    mesh: str
    max_num_seqs: int
    context: int
    chunk_tokens: int = CHUNK_TOKENS
    dtype: str | None = None
    weights_dtype: str | None = None
    kv_dtype: str | None = None
    dispatch: str | None = None
    layout: str = str(DEFAULT_LAYOUT)
    virtual_stages: int = 1
    ignore_config_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dtype", "weights_dtype", "kv_dtype"):
            object.__setattr__(self, name, canonical(getattr(self, name)))

    def chosen_kernels(
        self, config: ModelConfig, dtype: str, axes: Mapping[str, int], *, platform: str | None = None
    ) -> KernelConfig:
        """Choose kernels as LLM.load does. platform: by default this machine's. Raises: ConfigError."""
        shared = any(axes.get(axis, 1) > 1 for axis in parse_layout(self.layout).context)
        return choose_kernels(
            dtype, self.kernels, platform=platform, shared_pages=shared, quantization=config.quantization
        )

    @property
    def kernels(self) -> dict[str, Any]:
        """Return the kernel overrides of this request."""
        return {} if self.dispatch is None else {"dispatch": self.dispatch}

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the engine, as arguments of held_bytes and compile_step."""
        return {
            "max_num_seqs": self.max_num_seqs, "context": self.context, "page_size": PAGE_SIZE,
            "chunk_tokens": self.chunk_tokens
        }  # fmt: skip

    def checked_model(self) -> tuple[ModelConfig, dict[str, int]]:
        """Return the config in the requested dtypes, and the mesh axes.

        Raises: CheckpointError, ConfigError, LayoutError or MeshError naming the value, the limit and the remedy.
        """
        config = read_stored_config(find_config(self.config), ignore=self.ignore_config_keys)
        config, dtype = choose_dtypes(
            config, dtype=self.dtype, weights_dtype=self.weights_dtype, kv_dtype=self.kv_dtype
        )
        config = replace(config, dtype=dtype)
        KernelConfig(**self.kernels)
        axes = parse_mesh(self.mesh)
        parse_layout(self.layout)
        check_virtual_stages(self.virtual_stages, stages=axes["pipeline"])
        layer_segments(config, "scan", stages=axes["pipeline"], virtual_stages=self.virtual_stages)
        for name, limit in (
            ("max_num_seqs", _MAX_COUNT),
            ("context", config.max_position_embeddings),
            ("chunk_tokens", _MAX_COUNT),
        ):
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ConfigError(f"{name}={value} must lie in [1, {limit}]")
        return config, axes

    def runner(
        self, config: ModelConfig, mesh: Mesh | PlannedMesh, kernels: KernelConfig, *, dtype: str | None = None
    ) -> ModelRunner:
        """Return a ModelRunner of abstract shapes. It cannot run, but compiles if the mesh has devices.

        dtype: of activations; by default the config's.
        """
        placement = MeshPlacement(
            mesh=cast("Mesh", mesh), layout=parse_layout(self.layout), virtual_stages=self.virtual_stages
        )
        kv_dtype = kv_array_dtype(self.kv_dtype)
        return abstract_runner(config, placement, dtype=dtype or config.dtype, kv_dtype=kv_dtype, kernels=kernels)

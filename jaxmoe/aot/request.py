"""Request to inspect a model without its weights: config.json, mesh and workload, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from jax.sharding import Mesh

from jaxmoe.aot.compile import abstract_runner
from jaxmoe.config import ModelConfig
from jaxmoe.config.engine import EngineConfig, checked_config, split_options
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.errors import ConfigError
from jaxmoe.families.dtypes import choose_dtypes, kv_array_dtype
from jaxmoe.model.kernels import KernelConfig, choose_kernels, named_backends
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.parallel.stages import check_virtual_stages, layer_segments
from jaxmoe.weights.source import find_config
from jaxmoe.weights.stored import read_stored_config

_MAX_COUNT = 1 << 20  # largest max_num_seqs and chunk_tokens
_NEED_WEIGHTS = ("redundant_experts", "kv_cache_gib")  # options that a report without weights cannot follow


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """Describe a model on a mesh, and the requests to serve.

    model: a config.json, a folder that holds one, or a preset. engine: the options that LLM and AsyncEngine take. Its
    mesh and context (tokens per request) are required. The KV cache has pages for max_num_seqs requests of `context`
    tokens. host_cache_gib and verify have no effect.
    Raises: ConfigError for an option that needs weights.
    """

    model: str
    engine: EngineConfig

    def __post_init__(self) -> None:
        options, default = checked_config(self.engine).options(), EngineConfig().options()
        for name in _NEED_WEIGHTS:
            if options[name] != default[name]:
                raise ConfigError(f"{name}={options[name]!r} has no effect without weights: leave it out")

    @classmethod
    def of(cls, model: str, **options: Any) -> Self:
        """Return the request for a model.

        options: Fields of the request, and options of EngineConfig by their own names, which replace those of `engine`.
        Raises: ConfigError for a value out of range or an unknown name.
        """
        own, others = split_options(cls, options)
        engine = checked_config(own.pop("engine", None)).with_options(others)
        return cls(model=model, engine=engine, **own)

    @property
    def kernels(self) -> dict[str, Any]:
        """Return the kernel overrides of this request. Raises: ConfigError for an unknown op."""
        return {} if self.engine.kernels is None else named_backends(self.engine.kernels)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the engine, as arguments of held_bytes and compile_step. Raises: ConfigError."""
        engine = self.engine
        if engine.context is None:
            raise ConfigError("context=None must be a whole number: give the tokens of a request")
        return {
            "max_num_seqs": engine.max_num_seqs, "context": engine.context, "page_size": engine.cache.page_size,
            "chunk_tokens": engine.chunk_tokens,
        }  # fmt: skip

    def chosen_kernels(
        self, config: ModelConfig, dtype: str, axes: Mapping[str, int], *, platform: str | None = None
    ) -> KernelConfig:
        """Choose kernels as LLM.load does. platform: by default this machine's. Raises: ConfigError."""
        shared = any(axes.get(axis, 1) > 1 for axis in parse_layout(self.engine.parallel.layout).context)
        return choose_kernels(
            dtype, self.kernels, platform=platform, shared_pages=shared, quantization=config.quantization
        )

    def checked_model(self) -> tuple[ModelConfig, dict[str, int]]:
        """Return the config in the requested dtypes, and the mesh axes.

        Raises: CheckpointError, ConfigError, LayoutError or MeshError naming the value, the limit and the remedy.
        """
        engine, parallel = self.engine, self.engine.parallel
        path = find_config(self.model, revision=engine.revision)
        config = read_stored_config(path, ignore=engine.ignore_config_keys)
        config, dtype = choose_dtypes(
            config, dtype=engine.dtype, weights_dtype=engine.weights_dtype, kv_dtype=engine.cache.kv_dtype
        )
        config = replace(config, dtype=dtype)
        KernelConfig(**self.kernels)
        axes = parse_mesh(parallel.mesh)
        parse_layout(parallel.layout)
        check_virtual_stages(parallel.virtual_stages, stages=axes["pipeline"])
        layer_segments(config, "scan", stages=axes["pipeline"], virtual_stages=parallel.virtual_stages)
        for name, limit in (
            ("max_num_seqs", _MAX_COUNT),
            ("context", config.max_position_embeddings),
            ("chunk_tokens", _MAX_COUNT),
        ):
            if self.sizes[name] > limit:
                raise ConfigError(f"{name}={self.sizes[name]} must lie in [1, {limit}]")
        return config, axes

    def runner(
        self, config: ModelConfig, mesh: Mesh | PlannedMesh, kernels: KernelConfig, *, dtype: str | None = None
    ) -> ModelRunner:
        """Return a ModelRunner of abstract shapes. It cannot run, but compiles if the mesh has devices.

        dtype: of activations; by default the config's.
        """
        parallel = self.engine.parallel
        placement = MeshPlacement(
            mesh=cast("Mesh", mesh), layout=parse_layout(parallel.layout), virtual_stages=parallel.virtual_stages
        )
        kv_dtype = kv_array_dtype(self.engine.cache.kv_dtype)
        return abstract_runner(config, placement, dtype=dtype or config.dtype, kv_dtype=kv_dtype, kernels=kernels)

"""Configurations: ModelConfig of a model, EngineConfig of how it is loaded, placed and served."""

from jaxmoe.config.cache_spec import LayerCacheSpec, cache_groups
from jaxmoe.config.engine import CacheConfig, EngineConfig, EngineOptions, ParallelConfig
from jaxmoe.config.model import (
    ArraySizes,
    CheckpointLayout,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    Scoring,
    SwiGLUClamp,
    TopKOf,
    canonical_dtype,
)

__all__ = [
    "ArraySizes",
    "CacheConfig",
    "CheckpointLayout",
    "EngineConfig",
    "EngineOptions",
    "IndexerConfig",
    "LayerCacheSpec",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "RopeConfig",
    "Scoring",
    "SwiGLUClamp",
    "TopKOf",
    "cache_groups",
    "canonical_dtype",
]  # fmt: skip

"""Dtypes of weights, activations and the KV cache, by the names that users give."""

from __future__ import annotations

from typing import TypeVar

from jaxmoe.config import ModelConfig, canonical_dtype
from jaxmoe.errors import ConfigError
from jaxmoe.families import with_weights_dtype

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
Name = TypeVar("Name")


def canonical(name: Name) -> Name:
    """Return the full name of a dtype given as an alias (bf16, fp16, half, fp32, float); other values unchanged."""
    return canonical_dtype(name) if isinstance(name, str) else name  # type: ignore[return-value]


def choose_dtypes(
    config: ModelConfig, *, dtype: str | None, weights_dtype: str | None, kv_dtype: str | None
) -> tuple[ModelConfig, str]:
    """Return the model config with the requested weight quantization, and the dtype of activations.

    A weights_dtype equal to the checkpoint's own format leaves the weights as they are stored.
    Raises: ConfigError for an unknown dtype, or if unquantized weights have another dtype than activations.
    """
    dtype, weights_dtype = canonical(dtype), canonical(weights_dtype)
    config = with_weights_dtype(config, None if is_checkpoint_format(config, weights_dtype) else weights_dtype)
    plain = weights_dtype if weights_dtype in DTYPES else None
    if dtype is not None and plain is not None and dtype != plain:
        raise ConfigError(
            f"weights_dtype={weights_dtype} and dtype={dtype} differ: unquantized weights have the dtype of "
            f"activations; set only one of them"
        )
    dtype = plain or config.dtype if dtype is None else dtype
    check_dtypes(dtype, kv_dtype)
    return config, dtype


def is_checkpoint_format(config: ModelConfig, weights_dtype: str | None) -> bool:
    """Return whether weights_dtype names the quantization format of the checkpoint itself."""
    return config.checkpoint_quantization is not None and weights_dtype in config.checkpoint_quantization.format.names


def check_dtypes(dtype: str, kv_dtype: str | None) -> None:
    """Raise ConfigError if dtype, or kv_dtype of the KV cache (default: equal to dtype), is unknown."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if canonical(kv_dtype) not in (None, *KV_DTYPES):
        raise ConfigError(f"kv_dtype={kv_dtype!r} must be one of {', '.join(KV_DTYPES)}")


def kv_array_dtype(kv_dtype: str | None) -> str | None:
    """Return the dtype of the KV cache's arrays; None for the dtype of activations."""
    return None if kv_dtype is None else KV_DTYPES[canonical(kv_dtype)]

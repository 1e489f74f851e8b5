"""Describe a model from its config.json, and from the headers of weight files next to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxmoe.config import ModelConfig
from jaxmoe.config.engine import CHUNK_TOKENS
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.families import quantization_key, quantizer_name, read_config, without_quantization
from jaxmoe.planner.sizes import behind_windows, checkpoint_tensors, count_parameters, kv_numbers
from jaxmoe.weights.checkpoint import INDEX, SINGLE, open_tensors, read_json
from jaxmoe.weights.manifest import MANIFEST
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.source_checkpoint import config_check
from jaxmoe.weights.stored import as_stored


def model_info(path: Path, *, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """Return the description of a model that `jaxmoe info --json` prints.

    A weight format that cannot be run is named, and its bytes are None. Unknown settings that change no size are
    listed. If weight files are next to config.json, their tensors are checked against it.
    Raises: CheckpointError, ConfigError.
    """
    raw, ignored = read_json(path), list(ignore)
    key, notes = quantization_key(raw), list[str]()
    try:
        config, runs = read_config(raw, ignore=ignored, planned=True, not_understood=notes), True
    except ConfigError:
        if key is None:
            raise
        notes.clear()  # retry without quantization; any other error is raised again
        config, runs = read_config(without_quantization(raw), ignore=ignored, not_understood=notes), False
    has_weights = any((path.parent / name).is_file() for name in (SINGLE, INDEX, MANIFEST))
    tensors = open_tensors(path.parent) if has_weights else None
    config = config if tensors is None else as_stored(config, tensors, raw)
    counts = count_parameters(config)
    measured = None if tensors is None else _bytes_of_files(tensors, config)
    by_part: dict[Any, int | None] = {**(counts.num_bytes if measured is None else measured)}
    if not runs and measured is None:
        by_part = dict.fromkeys(by_part)
    kv_bytes = kv_numbers(config) * jnp.dtype(config.dtype).itemsize
    known = [one for one in by_part.values() if one is not None]
    return {
        "family": config.family,
        "dtype": config.dtype,
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "active_without_embedding": counts.active_without_embedding,
            "by_part": counts.by_part,
        },
        "bytes": {"total": sum(known) if known else None, "by_part": by_part, "measured": measured is not None},
        "config_check": None if tensors is None else _check(path.parent, tensors, raw, ignored),
        "quantization": None if key is None else _quantization(config, raw[key], runs=runs),
        "not_understood": notes,
        "layers": _layers(config),
        "attention": _attention(config),
        "experts": _experts(config),
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "kv_bytes_per_token": kv_bytes,
        "behind_windows": behind_windows(
            config,
            config.max_position_embeddings,
            chunk_tokens=CHUNK_TOKENS,
            num_bytes=kv_bytes / config.num_hidden_layers,
        ),
    }


def _check(directory: Path, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any], ignored: list[str]) -> str:
    try:
        return config_check(directory, tensors, raw, ignored)
    except (CheckpointError, ConfigError) as error:
        return str(error)


def _bytes_of_files(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, int]:
    """Sum the bytes of weight files by part of the model. Tensors that the model does not use count as unused."""
    numbers = (re.search(r"\blayers\.([0-9]{1,9})\.", key) for key in tensors)
    layers = {int(number[1]) for number in numbers if number}
    parts = {tensor.key: str(tensor.part) for tensor in checkpoint_tensors(config, layers=layers)}
    num_bytes: Counter[str] = Counter(dict.fromkeys(dict.fromkeys(parts.values()), 0))
    for key, tensor in tensors.items():
        names = (key, *(key.removesuffix(end) for end in ("_scale_inv", "_scale", "_blocks", "_scales")))
        num_bytes[next((parts[name] for name in names if name in parts), "unused")] += tensor.num_bytes
    return dict(num_bytes)


def _quantization(config: ModelConfig, raw: Any, *, runs: bool) -> dict[str, Any]:
    method = quantizer_name(raw)
    if config.checkpoint_quantization is None:
        return {"method": method, "supported": runs}
    form, runs = config.checkpoint_quantization.format, runs and config.checkpoint_quantization.method != "modelopt"
    return {
        "method": method, "supported": runs, "dtype": form.name if form.packing_factor > 1 else form.dtype,
        "inputs_per_scale": form.inputs, "outputs_per_scale": form.outputs,
    }  # fmt: skip


def _layers(config: ModelConfig) -> dict[str, int]:
    """Count the layers of each kind."""
    kinds: Counter[str] = Counter()
    for layer, sparse in enumerate(config.moe_layers):
        words = ["MoE" if sparse else "dense"]
        if window := config.sliding_windows[layer]:
            words.append(f"window of {window}")
        if chunk := config.chunk(layer):
            words.append(f"chunks of {chunk}")
        if not config.has_rope(layer):
            words.append("no rotary embedding")
        kinds[", ".join(words)] += 1
    return dict(kinds)


def _attention(config: ModelConfig) -> dict[str, Any]:
    common = {"heads": config.num_attention_heads, "head_dim": config.head_dim, "rotary_dims": config.rotary_dims}
    if config.mla is None:
        return {"kind": "grouped-query", "key_value_heads": config.num_key_value_heads, **common}
    latents = {"key_value_latent": config.mla.kv_lora_rank, "query_latent": config.mla.q_lora_rank}
    return {"kind": "latent", **latents, "value_head_dim": config.mla.v_head_dim, **common}


def _experts(config: ModelConfig) -> dict[str, Any] | None:
    moe = config.moe
    if moe is None:
        return None
    return {
        "experts": moe.num_experts, "experts_per_token": moe.num_experts_per_tok, "width": moe.intermediate_size,
        "scoring": moe.scoring, "groups": moe.num_groups, "groups_per_token": moe.top_groups,
        "shared_width": moe.shared_intermediate_size,
    }  # fmt: skip

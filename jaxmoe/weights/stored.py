"""Completing a model config from the checkpoint's tensors: layout of names, tied LM head, and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.config import CheckpointLayout, ModelConfig
from jaxmoe.errors import MissingWeightsError
from jaxmoe.families import FAMILIES, is_exact, read_config, states_dtype, with_layout
from jaxmoe.families.parameters import DOWN, EMBEDDING, GATE_UP, HEAD
from jaxmoe.weights.checkpoint import CONFIG, open_tensors, read_json
from jaxmoe.weights.dtypes import FLOAT_NAMES
from jaxmoe.weights.quantized_sources import quantized_tensor_names
from jaxmoe.weights.safetensors_file import FLOATS, TensorInfo

_COMPARED_BYTES = 4 << 20  # of each of two tensors, per read
_STACKED_ENDS = tuple(f".{name}{end}" for name in (GATE_UP, DOWN) for end in ("", "_blocks"))


def as_stored(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any], *, compare: bool = True
) -> ModelConfig:
    """Return the config of the model in a checkpoint, completed from its tensors.

    raw: the parsed config.json, which config was read from. The layout follows the names of the tensors. If config.json
    states no dtype, the dtype of the files is used. A stored LM head is used, as in transformers, if its values differ
    from the embedding although config.json ties them; both tensors are read for this comparison. compare=False:
    consider a stored head different without reading it.
    Raises: CheckpointError if a file cannot be read.
    """
    names = FAMILIES[config.family].names
    head, embedding = (tensors.get(names.prefix + key) for key in (HEAD, EMBEDDING))
    if config.tie_word_embeddings and head is not None and embedding is not None:
        config = replace(config, tie_word_embeddings=compare and same_values(head, embedding))
    if not states_dtype(raw):
        config = replace(config, dtype=_dtype_of(tensors, config))
    return with_layout(config, stored_layout(config, tensors))


def read_stored_config(
    path: Path, *, ignore: Iterable[str] = (), planned: bool = False, not_understood: list[str] | None = None
) -> ModelConfig:
    """Return the config of a config.json, completed from the weights next to it if their files are complete.

    ignore, planned, not_understood: see read_config.
    Raises: CheckpointError, also for complete weights that are damaged or contradictory; ConfigError.
    """
    raw = read_json(path)
    config = read_config(raw, ignore=ignore, planned=planned, not_understood=not_understood)
    if path.name != CONFIG or (states_dtype(raw) and not config.tie_word_embeddings):
        return config
    try:
        tensors = open_tensors(path.parent)
    except MissingWeightsError:  # weights are missing or incomplete: use the config alone
        return config
    return as_stored(config, tensors, raw)


def stored_layout(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> CheckpointLayout:
    """Return the checkpoint layout that the names of its tensors imply."""
    names = FAMILIES[config.family].names
    experts = config.moe is not None and names.fused is None
    alone = names.prefix + HEAD in tensors and names.prefix + EMBEDDING not in tensors
    return CheckpointLayout(
        stacked_experts=experts and any(key.endswith(_STACKED_ENDS) for key in tensors),
        head_is_embedding=config.tie_word_embeddings and alone,
    )


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two floating-point tensors have equal values, reading them up to the first difference."""
    if one.shape != other.shape or one.dtype_name not in FLOATS or other.dtype_name not in FLOATS:
        return False
    num_rows = one.shape[0] if one.shape else 0
    step = max(1, _COMPARED_BYTES * num_rows // max(1, one.num_bytes, other.num_bytes))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        rows, others = one.read_rows(first, last), other.read_rows(first, last)
        if one.dtype_name == other.dtype_name:
            rows, others = rows.view(np.uint8), others.view(np.uint8)  # compare bits, so that NaN equals itself
        else:
            rows, others = rows.astype(np.float32), others.astype(np.float32)
        if not np.array_equal(rows, others):
            return False
    return True


def _dtype_of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> str:
    """Return the dtype of most numbers in floating-point tensors, without scales of quantized tensors.

    Without such tensors, return the dtype of the config.
    """
    others = FAMILIES[config.family].names.others
    scales = (
        quantized_tensor_names("", config.checkpoint_quantization)[1]
        if config.checkpoint_quantization is not None
        else None
    )
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        beside = name.startswith(others) or is_exact(name) or (scales is not None and name.endswith(scales))
        if tensor.dtype_name in FLOATS and not beside:
            counts[tensor.dtype_name] += tensor.num_bytes // tensor.dtype.itemsize
    return FLOAT_NAMES[max(counts, key=lambda name: counts[name])] if counts else config.dtype

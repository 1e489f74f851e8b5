"""Export of trained parameters to a Hugging Face checkpoint. It applies the loader's weight slices in reverse."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxmoe.config import ModelConfig
from jaxmoe.errors import CheckpointError
from jaxmoe.families import FAMILIES, weight_slices
from jaxmoe.jsontext import json_text
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.weights.checkpoint import SINGLE
from jaxmoe.weights.dtypes import check_reach
from scripts.demo_tokenizer import END_OF_TEXT

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def checkpoint_arrays(
    params: Mapping[str, jax.Array], config: ModelConfig, placement: MeshPlacement, segments: tuple[LayerSegment, ...]
) -> dict[str, np.ndarray]:
    """Return every checkpoint tensor by its key, in the config's dtype. params: arrays by their path in the model."""
    arrays = {path: np.asarray(array) for path, array in params.items()}
    tensors: dict[str, np.ndarray] = {}
    sizes = segment_sizes(config, placement, segments)
    for weight_slice in weight_slices(config, sizes, FAMILIES[config.family].names, segments):
        tensor = tensors.setdefault(weight_slice.key, np.zeros(weight_slice.key_shape, _DTYPES[config.dtype]))
        block = arrays[weight_slice.path][weight_slice.dst]
        check_reach(weight_slice.key, block, tensor.dtype, "train on from an earlier step, or export in float32")
        tensor[weight_slice.src] = block.T if weight_slice.transpose else block
    return tensors


def hf_config(config: ModelConfig, *, eos_token_id: int) -> dict[str, Any]:
    """Return the config.json of a Qwen3-MoE model in Hugging Face's format.

    Raises: CheckpointError for other families, and for RoPE scaling, attention biases and sliding windows.
    """
    moe = config.moe
    plain = config.rope.scaling == "none" and not config.qkv_bias and set(config.sliding_windows) == {None}
    if config.family != "qwen3_moe" or moe is None or not plain:
        raise CheckpointError(
            f"only plain qwen3_moe models can be exported, not this {config.family} model: train a qwen3_moe model "
            "without RoPE scaling, attention biases and sliding windows"
        )
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": eos_token_id,
        "decoder_sparse_step": 1,
        "eos_token_id": eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_only_layers": [layer for layer, sparse in enumerate(config.moe_layers) if not sparse],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "num_attention_heads": config.num_attention_heads,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope.theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def write_checkpoint(
    directory: Path,
    params: Mapping[str, jax.Array],
    config: ModelConfig,
    placement: MeshPlacement,
    segments: tuple[LayerSegment, ...],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write weights, configs and, if given, the tokenizer to an existing directory that LLM.load can read."""
    end = (tokenizer.token_to_id(END_OF_TEXT) if tokenizer is not None else None) or 0
    write_json(directory / "config.json", hf_config(config, eos_token_id=end))
    save_file(checkpoint_arrays(params, config, placement, segments), directory / SINGLE, metadata={"format": "pt"})
    (directory / SINGLE).chmod(0o644)  # safetensors creates it readable by its owner only
    write_json(directory / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    if tokenizer is None:
        return
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position_embeddings,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    write_json(directory / "tokenizer_config.json", settings)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write value as indented JSON with a final newline."""
    path.write_text(json_text(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_facts(directory: Path) -> dict[str, dict[str, Any]]:
    """Return SHA-256 and size in bytes of every file of a directory, by name."""
    return {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
    }


def replace_directory(new: Path, destination: Path) -> None:
    """Replace `destination` by `new` with renames. Both must be on the same file system."""
    aside = new.with_name(new.name + ".old")
    if destination.exists():
        os.rename(destination, aside)
    os.rename(new, destination)
    shutil.rmtree(aside, ignore_errors=True)

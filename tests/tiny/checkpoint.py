"""Writes a case as a checkpoint directory, byte for byte the same on every platform and numpy version.

Dims: V vocabulary, D hidden_size, H query heads, K key/value heads, C head_dim, F intermediate, E experts; of latent
attention Q and R the latents of queries and of keys, N and P numbers of a head that are not turned and turned, W value.
Keys and shapes are those of published files (torch Linear layout, [out, in]; one tensor an expert), stated here apart
from jaxmoe's own key maps so that a mistake there cannot hide.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .cases import Case

_INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_QKV_BIAS_FAMILIES = ("qwen2", "qwen2_moe")
_HEAD_NORM_FAMILIES = ("qwen3", "qwen3_moe")
_SELECTION_BIAS_FAMILIES = ("deepseek_v3", "kimi_k2", "glm4_moe")
_EXACT = "e_score_correction_bias"  # in float32 in every file


def tensor_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor in the checkpoint, in the order of the published files."""
    config = case.config
    V, D = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (D,)
        shapes |= {f"{prefix}self_attn.{key}": shape for key, shape in _attention(case)}
        shapes[f"{prefix}post_attention_layernorm.weight"] = (D,)
        shapes |= {f"{prefix}{key}": shape for key, shape in _feed_forward(case, layer)}
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _attention(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = case.config
    if "kv_lora_rank" in config:
        yield from _latent_attention(config)
        return
    D, H = config["hidden_size"], config["num_attention_heads"]
    K = config.get("num_key_value_heads", H)
    C = config.get("head_dim") or D // H
    bias = config.get("attention_bias", case.family == "gpt_oss")
    qkv_bias = bias or case.family in _QKV_BIAS_FAMILIES
    for name, shape in (("q_proj", (H * C, D)), ("k_proj", (K * C, D)), ("v_proj", (K * C, D)), ("o_proj", (D, H * C))):
        yield f"{name}.weight", shape
        if bias and case.family != "glm4_moe" if name == "o_proj" else qkv_bias:
            yield f"{name}.bias", shape[:1]
    if case.family == "gpt_oss":
        yield "sinks", (H,)
    if case.family in _HEAD_NORM_FAMILIES or (config.get("use_qk_norm", False) and case.family == "glm4_moe"):
        yield from (("q_norm.weight", (C,)), ("k_norm.weight", (C,)))
    if case.family == "olmoe":
        yield from (("q_norm.weight", (H * C,)), ("k_norm.weight", (K * C,)))


def _latent_attention(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, H, Q = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    R, N, P = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    W = config["v_head_dim"]
    if Q is None:
        yield "q_proj.weight", (H * (N + P), D)
    else:
        yield from (("q_a_proj.weight", (Q, D)), ("q_a_layernorm.weight", (Q,)), ("q_b_proj.weight", (H * (N + P), Q)))
    yield "kv_a_proj_with_mqa.weight", (R + P, D)
    yield "kv_a_layernorm.weight", (R,)
    yield "kv_b_proj.weight", (H * (N + W), R)
    yield "o_proj.weight", (D, H * W)


def _fused_experts(prefix: str, D: int, F: int, E: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate_up_proj", (E, D, 2 * F)), ("down_proj", (E, F, D))):
        yield f"{prefix}{name}", shape
        if bias:
            yield f"{prefix}{name}_bias", (E, shape[2])


def _llama4(config: dict[str, Any], *, sparse: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F, prefix = config["hidden_size"], config["intermediate_size"], "feed_forward."
    if not sparse:
        yield from _gated_mlp(prefix, D, config["intermediate_size_mlp"])
        return
    yield f"{prefix}router.weight", (config["num_local_experts"], D)
    yield from _fused_experts(f"{prefix}experts.", D, F, config["num_local_experts"], bias=False)
    yield from _gated_mlp(f"{prefix}shared_expert.", D, F)


def _feed_forward(case: Case, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = case.config
    D = config["hidden_size"]
    if case.family == "llama4_text":
        yield from _llama4(config, sparse=(layer + 1) % config["interleave_moe_layer_step"] == 0)
    elif case.family == "gpt_oss":
        E = config["num_local_experts"]
        yield from (("mlp.router.weight", (E, D)), ("mlp.router.bias", (E,)))
        yield from _fused_experts("mlp.experts.", D, config["intermediate_size"], E, bias=True)
    elif not _is_sparse(case, layer):
        yield from _gated_mlp("mlp.", D, config["intermediate_size"], bias=config.get("mlp_bias", False))
    elif case.family == "mixtral":
        F, E = config["intermediate_size"], config["num_local_experts"]
        yield "block_sparse_moe.gate.weight", (E, D)
        for expert in range(E):
            prefix = f"block_sparse_moe.experts.{expert}."
            yield from ((f"{prefix}w1.weight", (F, D)), (f"{prefix}w2.weight", (D, F)), (f"{prefix}w3.weight", (F, D)))
    else:
        F = config.get("moe_intermediate_size", config["intermediate_size"])
        E = config.get("n_routed_experts") or config["num_experts"]
        yield "mlp.gate.weight", (E, D)
        if case.family in _SELECTION_BIAS_FAMILIES:
            yield "mlp.gate.e_score_correction_bias", (E,)
        for expert in range(E):
            yield from _gated_mlp(f"mlp.experts.{expert}.", D, F)
        if case.family == "qwen2_moe":
            yield from _gated_mlp("mlp.shared_expert.", D, config["shared_expert_intermediate_size"])
            yield "mlp.shared_expert_gate.weight", (1, D)
        if "n_shared_experts" in config:
            yield from _gated_mlp("mlp.shared_experts.", D, F * config["n_shared_experts"])


def _gated_mlp(prefix: str, D: int, F: int, *, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
        yield f"{prefix}{name}.weight", shape
        if bias:
            yield f"{prefix}{name}.bias", shape[:1]


def _is_sparse(case: Case, layer: int) -> bool:
    config = case.config
    if "num_experts_per_tok" not in config:
        return False
    if layer < config.get("first_k_dense_replace", 0):
        return False
    return layer not in config.get("mlp_only_layers", ()) and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def _scale(case: Case, key: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a tensor's entries.

    Chosen so that logits spread over several units, attention is peaked enough for positions to matter, every layer
    adds as much as the residual it joins, and the chosen experts stand clear of the others.
    """
    *_, name, last = key.split(".")
    fan_in = shape[-1]
    if "norm" in name:
        return 0.2
    if last == "sinks":
        return 1.5
    if last.endswith("bias"):
        return 0.4
    if len(shape) == 3:  # fused experts, [expert, in, out]
        return (2.0 if last == "down_proj" else 1.4) / math.sqrt(shape[1])
    if name == "embed_tokens":
        return 3.0 / math.sqrt(fan_in) if case.config["tie_word_embeddings"] else 1.0
    if name in ("lm_head", "gate", "router"):
        return 3.0 / math.sqrt(fan_in)
    if name in ("down_proj", "w2", "shared_expert_gate"):
        return 2.0 / math.sqrt(fan_in)
    return 1.4 / math.sqrt(fan_in)


def _values(case: Case, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform entries [*shape] in the dtype of the file; norm weights lie around 1, all else around 0.

    Raw PCG64 bits, exact in float32, then one multiplication: nothing a libm or a numpy release could round apart.
    """
    bits = np.random.PCG64(np.random.SeedSequence([case.seed, zlib.crc32(key.encode())])).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    values = unit * np.float32(_scale(case, key, shape) * math.sqrt(3))
    if "norm" in key.split(".")[-2]:
        values += np.float32(1)
    return values.reshape(shape).astype(np.float32 if key.endswith(_EXACT) else _DTYPES[case.dtype])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint(case: Case, directory: Path) -> Path:
    """Write config.json, generation_config.json and the model file or files of `case`; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", case.config)
    token_ids = {key: value for key, value in case.config.items() if key in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **token_ids})

    tensors = {key: _values(case, key, shape) for key, shape in tensor_shapes(case).items()}
    metadata = {"format": "pt"}
    if not case.sharded:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return directory

    keys = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(case.num_shards):
        name = f"model-{shard + 1:05d}-of-{case.num_shards:05d}.safetensors"
        members = keys[shard * len(keys) // case.num_shards : (shard + 1) * len(keys) // case.num_shards]
        save_file({key: tensors[key] for key in members}, directory / name, metadata=metadata)
        weight_map |= dict.fromkeys(members, name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return directory


def checkpoint_sha256(directory: Path) -> str:
    """Hex sha256 over the names and bytes of config.json, the index if any and the model files."""
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("model*.safetensors*")]):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little") + path.read_bytes())
    return digest.hexdigest()

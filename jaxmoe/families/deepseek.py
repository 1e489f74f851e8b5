"""DeepSeek-V2, V3, R1, V3.1 and Kimi-K2: latent attention, a dense prefix, shared experts, group-limited routing.

DeepSeek-V3.2, which adds sparse attention, can be read but not run. A key is required if DeepSeek's own code and
Hugging Face's disagree on its default.
Source: the published configs and modeling code of DeepSeek-V2 and DeepSeek-V3; Hugging Face's DeepseekV2Config and
DeepseekV3Config.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxmoe.config import IndexerConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jaxmoe.families.decoder import (
    read_decoder,
    read_dense_prefix,
    read_layer_types,
    read_mtp_layers,
    read_shared_experts,
    read_sigmoid_routing,
)
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import REQUIRED, ConfigReader, read_num_experts
from jaxmoe.families.rope_keys import check_agree, rope_scalings, yarn_mscale

_SPARSE = "deepseek_v32"


def read_latent(reader: ConfigReader) -> MLAConfig:
    """Return the sizes of latent attention."""
    return MLAConfig(
        kv_lora_rank=reader.whole("kv_lora_rank"),
        q_lora_rank=reader.whole("q_lora_rank", None, absent=1536),
        qk_nope_head_dim=reader.whole("qk_nope_head_dim"),
        qk_rope_head_dim=reader.whole("qk_rope_head_dim"),
        v_head_dim=reader.whole("v_head_dim"),
    )


def read_score_scale(reader: ConfigReader, head_dim: int, rope: RopeConfig) -> float:
    """Return the scale of attention scores.

    It is head_dim**-0.5, times the square of YaRN's factor for mscale_all_dim if that is set.
    """
    said = {key: ConfigReader(one).number("mscale_all_dim", 0.0) for key, one in rope_scalings(reader).items()}
    if len(set(said.values())) > 1:
        check_agree(reader, ["mscale_all_dim"])
    all_dim = next(iter(said.values()), 0.0)
    scale = head_dim**-0.5
    return scale * yarn_mscale(rope.factor, all_dim) ** 2 if rope.scaling == "yarn" and all_dim else scale


def _softmax_routing(reader: ConfigReader) -> dict[str, Any]:
    """Return the routing of DeepSeek-V2: softmax scores, unnormalized weights, groups ranked by their best expert."""
    reader.expect("scoring_func", "softmax")
    reader.expect("topk_method", "greedy", "group_limited_greedy")
    reader.expect("norm_topk_prob", False)
    grouped = reader.get("topk_method", "greedy") == "group_limited_greedy"
    groups, best = (reader.whole(key, REQUIRED if grouped else 1) for key in ("n_group", "topk_group"))
    return dict(
        norm_topk_prob=False,
        num_groups=groups if grouped else 1,
        top_groups=best if grouped else 1,
        experts_per_group_score=1,
    )


def _read(reader: ConfigReader, *, family: str, sigmoid: bool) -> ModelConfig:
    interleaved = reader.flag("rope_interleave", True)
    reader.expect("attention_bias", False, sized=True)
    reader.expect("mlp_bias", False, sized=True)
    latent = read_latent(reader)
    shared = read_decoder(reader, latent=latent, interleaved=interleaved, absent_kv_heads="as heads")
    layers, width = shared["num_hidden_layers"], reader.whole("moe_intermediate_size")
    reader.expect("qk_head_dim", shared["head_dim"], sized=True)
    for key in ("aux_loss_alpha", "seq_aux", "ep_size"):
        reader.get(key, None)
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "n_routed_experts", "num_local_experts", "num_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=read_shared_experts(reader, width),
        routed_scaling=reader.number("routed_scaling_factor", REQUIRED if sigmoid else 1.0),
        **(read_sigmoid_routing if sigmoid else _softmax_routing)(reader),
    )
    return ModelConfig(
        family=family,
        **shared,
        mla=latent,
        indexer=_read_indexer(reader) if family == _SPARSE else None,
        score_scale=read_score_scale(reader, shared["head_dim"], shared["rope"]),
        moe=moe,
        moe_layers=_moe_layers(reader, layers, family=family),
        sliding_windows=(None,) * layers,
        mtp_layers=read_mtp_layers(reader, absent=1 if sigmoid else 0),
    )


def _moe_layers(reader: ConfigReader, layers: int, *, family: str) -> tuple[bool, ...]:
    """Return which layers are MoE: all after a dense prefix.

    transformers' DeepSeek-V3.2 class may also list the kind of each layer.
    """
    if family != _SPARSE:
        return read_dense_prefix(reader, num_layers=layers, default=0 if family == "deepseek_v2" else REQUIRED)
    read_layer_types(reader, ("indexed_attention", "deepseek_sparse_attention"), num_layers=layers)
    kinds = read_layer_types(reader, ("dense", "sparse"), num_layers=layers, key="mlp_layer_types", sized=True)
    if kinds is None:
        return read_dense_prefix(reader, num_layers=layers, default=REQUIRED)
    reader.expect("moe_layer_freq", 1, sized=True)
    reader.get("first_k_dense_replace", None)  # the list takes precedence
    return tuple(kind == "sparse" for kind in kinds)


def _read_indexer(reader: ConfigReader) -> IndexerConfig:
    names = {"num_heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk"}
    return IndexerConfig(**{name: reader.whole(key) for name, key in names.items()})


NAMES = CheckpointKeys(selection_bias="gate.e_score_correction_bias", shared="shared_experts")
_ARCHITECTURES = {
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    _SPARSE: ("DeepseekV32ForCausalLM",),
    "kimi_k2": ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
}
FAMILIES = tuple(
    ModelFamily(
        name=name, read=partial(_read, family=name, sigmoid=name != "deepseek_v2"), names=NAMES,
        architectures=architectures, own_code=True,
    )
    for name, architectures in _ARCHITECTURES.items()
)  # fmt: skip

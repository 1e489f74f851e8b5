"""config.json to ModelConfig: published files are read, and any key that changes the maths unsupported is an error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import ConfigError
from jaxmoe.config import MLAConfig, ModelConfig, SwiGLUClamp
from jaxmoe.families import may_stand_unused, read_config
from jaxmoe.families.keys import CheckpointKeys

from ..tiny.cases import CASES, CASES_BY_NAME, QUICK_CASES

CONFIGS = Path(__file__).parent / "configs"
QUICK = {case.family: case.config for case in QUICK_CASES}


def _published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def _changed(family: str, **changes: Any) -> dict[str, Any]:
    return {**QUICK[family], **changes}


UNQUANTIZED = {
    path.stem: {key: value for key, value in _published(path.stem).items() if key != "quantization_config"}
    for path in CONFIGS.glob("*.json")
}


def test_llama_405b():
    config = read_config(_published("meta-llama--Meta-Llama-3.1-405B"))
    assert (config.family, config.num_hidden_layers, config.hidden_size) == ("llama", 126, 16384)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (128, 8, 128)
    assert (config.rope.scaling, config.rope.theta, config.rope.factor) == ("llama3", 500000.0, 8.0)
    assert not any(config.moe_layers)
    assert config.dtype == "bfloat16"


def test_mixtral_8x22b():
    config = read_config(_published("mistralai--Mixtral-8x22B-v0.1"))
    assert (config.moe.num_experts, config.moe.num_experts_per_tok, config.moe.norm_topk_prob) == (8, 2, True)
    assert config.moe.intermediate_size == 16384
    assert all(config.moe_layers)
    assert set(config.sliding_windows) == {None}


def test_qwen3_235b():
    config = read_config(_published("Qwen--Qwen3-235B-A22B"))
    assert (config.moe.num_experts, config.moe.num_experts_per_tok) == (128, 8)
    assert (config.head_dim, config.qk_norm) == (128, "head")
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert all(config.moe_layers)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_every_published_config_is_read_by_its_family(name):
    assert read_config(UNQUANTIZED[name]).family == UNQUANTIZED[name]["model_type"]


def test_published_configs_of_many_families_are_here():
    types = {_published(path.stem)["model_type"] for path in CONFIGS.glob("*.json")}
    frontier = {"deepseek_v3", "deepseek_v32", "kimi_k2", "gpt_oss", "llama4"}
    assert types == {"llama", "mixtral", "qwen3_moe"} | frontier


def test_deepseek_v3():
    config = read_config(UNQUANTIZED["deepseek-ai--DeepSeek-V3"])
    assert config.mla == MLAConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert (config.head_dim, config.num_key_value_heads, config.num_query_groups) == (192, 1, 128)
    assert {spec.head_dims for spec in config.cache_specs} == {(576,)}
    moe = config.moe
    assert (moe.scoring, moe.num_groups, moe.top_groups, moe.experts_per_group_score, moe.routed_scaling) == (
        "sigmoid",
        8,
        4,
        2,
        2.5,
    )
    assert config.moe_layers == (False,) * 3 + (True,) * 58
    assert config.rope.attention_factor == 1.0
    assert config.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert config.mtp_layers == 1


def test_gpt_oss():
    config = read_config(UNQUANTIZED["openai--gpt-oss-20b"])
    assert config.sliding_windows == (128, None) * 12
    assert config.moe.clamp == SwiGLUClamp(limit=7.0, alpha=1.702)
    assert config.rope.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    assert not config.rope.truncate


def test_llama4_scout_is_read_from_the_text_part():
    config = read_config(_published("meta-llama--Llama-4-Scout-17B-16E-Instruct"))
    assert config.attention_chunks[:4] == (8192, 8192, 8192, None)
    assert config.rope_layers[:4] == (True, True, True, False)
    assert all(config.moe_layers)
    assert (config.attn_temperature_tuning, config.dtype) == ((0.1, 8192), "bfloat16")


@pytest.mark.parametrize("model_type", [None, "", "LLAMA", "gpt2", 5, [], ["llama"], {"llama": 1}, True])
def test_a_model_type_that_is_no_family(model_type):
    with pytest.raises(ConfigError, match="which is not a supported family; supported: deepseek_v2, deepseek_v3, "):
        read_config(_changed("llama", model_type=model_type))


# --- what changes the maths and is not supported ---

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SUPPORTED_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", sorted(QUICK))
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_scaling", {"type": "longrope"}, "has rope_type 'longrope'; supported are default, linear, llama3, yarn"),
        ("rope_scaling", {**YARN, "short_factor": [1]}, r"'rope_scaling' has unsupported keys \['short_factor'\]"),
        ("rope_scaling", {**YARN, "beta_fast": 0.5}, "beta_fast=0.5 must be at least beta_slow=1.0"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "'rope_scaling' has rope_type 'dynamic'"),
        ("rope_scaling", {**SUPPORTED_LLAMA3, "mscale": 1.0}, r"'rope_scaling' has unsupported keys \['mscale'\]"),
        ("rope_scaling", {"type": "linear"}, r"'rope_scaling' of rope_type 'linear' lacks the numbers \['factor'\]"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, r"factor=0.5 must be at least 1"),
        ("rope_scaling", "yarn", "'rope_scaling' = 'yarn' must be an object or null"),
        ("rope_theta", 0, "rope_theta=0.0 must be above 0"),
        ("partial_rotary_factor", 0, "'partial_rotary_factor' = 0"),
        ("hidden_act", "gelu", "'hidden_act' = 'gelu' changes the computation and only 'silu' is supported"),
        ("quantization_config", {"quant_method": "awq"}, "'quantization_config' has quant_method 'awq'"),
        ("quantization_config", "fp8", "'quantization_config' has quant_method 'fp8'"),
        ("attn_logit_softcapping", 30.0, "'attn_logit_softcapping' = 30.0"),
        ("final_logit_softcapping", 30.0, "'final_logit_softcapping' = 30.0"),
        ("embedding_multiplier", 12, "'embedding_multiplier' = 12"),
        ("unheard_of_gate", "x", "'unheard_of_gate' = 'x'"),
    ],
)
def test_a_key_that_changes_the_maths_is_named(family, key, value, words):
    raw = _changed(family, **{key: value})
    if key == "rope_scaling":
        raw.pop("rope_parameters", None)
    with pytest.raises(ConfigError, match=words):
        read_config(raw)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": -1}, "sliding_window=-1 must be at least 1"),
        ("mistral", {"sliding_window": "9"}, "'sliding_window' = '9' must be a whole number"),
        ("mistral", {"sliding_window": 9.0}, "'sliding_window' = 9.0 must be a whole number"),
        ("llama", {"sliding_window": 9}, "not supported: 'sliding_window' = 9"),
        ("llama", {"layer_types": ["full_attention"] * 3}, "not supported: 'layer_types'"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "'layer_types' = .* must hold one of"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "'layer_types' = .* must hold one of"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' names sliding_attention but no sliding"),
        ("qwen2", {"layer_types": "full_attention"}, "'layer_types' = .* must hold one of"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "'mlp_only_layers' = 1 must be a list"),
        ("qwen3_moe", {"mlp_only_layers": [[0]]}, "'mlp_only_layers' = .* must be a list"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' = 0 must be at least 1"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "'shared_expert_intermediate_size' = 64"),
        ("mixtral", {"num_experts_per_tok": 7}, r"num_experts_per_tok=7 must lie in \[1, num_experts=6\]"),
        ("mixtral", {"num_local_experts": 0}, r"'num_local_experts' = 0 must lie in \[1, 10000\]"),
        ("mixtral", {"num_local_experts": None}, "no 'num_local_experts', which this family needs"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv=0.0 must be above 0"),
        ("llama", {"vocab_size": 10**30}, "'vocab_size' = 1000.* must lie within"),
        ("llama", {"num_hidden_layers": 10**9}, r"'num_hidden_layers' = 1000000000 must lie in \[1, 10000\]"),
        ("llama", {"num_hidden_layers": 0}, r"'num_hidden_layers' = 0 must lie in \[1, 10000\]"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 2}, "must be a multiple of"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "'partial_rotary_factor' = 1.5 must lie above 0"),
        ("glm4_moe", {"n_group": 2}, "num_groups=2 must divide num_experts=7"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "'scoring_func' = 'softmax' changes the computation .*'sigmoid'"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank=0 must be a whole number of at least 1"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2 must equal num_attention_heads=4"),
        ("deepseek_v3", {"first_k_dense_replace": 9}, r"'first_k_dense_replace' = 9 must lie in \[0, 4\]"),
        ("deepseek_v3", {"num_nextn_predict_layers": -1}, r"'num_nextn_predict_layers' = -1 must lie in \[0, 10000\]"),
        ("glm4_moe", {"num_nextn_predict_layers": 2 * 10**9}, r"= 2000000000 must lie in \[0, 10000\]"),
        ("glm4_moe", {"num_mtp_layers": 2}, "different numbers of layers of multi-token prediction"),
        ("deepseek_v3", {"qk_head_dim": 1}, "'qk_head_dim' = 1 changes the computation"),
        ("gpt_oss", {"experts_per_token": 1}, "different numbers of experts per token"),
        ("llama", {"torch_dtype": 0}, "'torch_dtype' = '0' must be"),
        ("llama", {"torch_dtype": []}, r"'torch_dtype' = '\[\]' must be"),
        ("llama", {"rope_scaling": {"rope_type": 0}}, "has rope_type 0; supported"),
        ("llama", {"rope_scaling": {"rope_type": []}}, r"has rope_type \[\]; supported"),
        ("llama", {"quantization_config": []}, r"has quant_method \[\]; supported"),
        ("llama", {"quantization_config": ""}, "has quant_method ''; supported"),
        ("llama", {"quantization_config": 0}, "has quant_method 0; supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'topk_method' = 'noaux_tc' changes the computation"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit=0.0 must be above 0"),
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok=2 must be 1 with apply_router_weight"),
        ("llama4_text", {"attention_chunk_size": 0}, "attention_chunk_size=0 must be at least 1"),
        ("llama4_text", {"no_rope_layers": [1]}, r"'no_rope_layers' = \[1\] must hold 0 or 1 for each of 4 layers"),
        ("llama", {"head_dim": 15}, "head_dim=15 must be even"),
        ("llama", {"hidden_size": True}, "'hidden_size' = True must be a whole number"),
        ("llama", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' = nan must be a finite number"),
        ("llama", {"rms_norm_eps": 10**400}, "'rms_norm_eps' = 1000.* must be a finite number"),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, "'torch_dtype' = 'float8_e4m3fn' must be"),
        ("llama", {"attention_bias": 1}, "'attention_bias' = 1 must be true or false"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'rope_parameters' differ in factor, "),
    ],
)
def test_a_value_that_cannot_be(family, changes, words):
    with pytest.raises(ConfigError, match=words):
        read_config(_changed(family, **changes))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_key_that_is_needed_and_absent(key):
    raw = {k: v for k, v in QUICK["mistral"].items() if k != key}
    with pytest.raises(ConfigError, match=f"config.json has no {key!r}, which this family needs: add it"):
        read_config(raw)


# --- what does not ---


@pytest.mark.parametrize("family", sorted(QUICK))
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_key_that_says_nothing_is_fine(family, value):
    assert read_config(_changed(family, unheard_of=value)) == read_config(QUICK[family])


def test_the_text_model_of_several_is_read():
    text = _changed("llama4_text")
    whole = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_act": "gelu"}}
    assert read_config(whole) == replace(read_config(text), family="llama4")
    with pytest.raises(ConfigError, match=r"'quantization_config' is in 'text_config', .*: move it to the top"):
        read_config(whole | {"text_config": text | {"quantization_config": {"quant_method": "awq"}}})
    with pytest.raises(ConfigError, match="of family 'llama4' has no object 'text_config'"):
        read_config({"model_type": "llama4"})


def test_ignored_keys_are_passed_over_and_no_others():
    raw = _changed("llama", unheard_gate=1, other_gate=2)
    assert read_config(raw, ignore=["unheard_gate", "other_gate"]) == read_config(QUICK["llama"])
    with pytest.raises(ConfigError, match="not supported: 'other_gate' = 2; if harmless") as caught:
        read_config(raw, ignore=["unheard_gate"])
    assert "unheard_gate" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'unheard_gates' is not a key of .*, did you mean 'unheard_gate'"):
        read_config(raw, ignore=["unheard_gates"])
    with pytest.raises(ConfigError, match=r"'' is not a key of config.json: remove the option$"):
        read_config(raw, ignore=[""])


def test_ignoring_does_not_hide_a_key_that_is_read():
    with pytest.raises(ConfigError, match="rope_type 'dynamic'"):
        read_config(_changed("llama", rope_scaling={"type": "dynamic"}), ignore=["rope_scaling"])


@pytest.mark.parametrize(
    ("top", "inner", "dims"),
    [(None, 1.0, 12), (0.25, 1.0, 12), (0.5, 1 / 3, 4), (1 / 3, None, 4), (None, None, 6), (1.0, None, 12)],
)
def test_the_share_of_a_head_that_is_turned(top, inner, dims):
    """Of 12 numbers of a head: the newer form first, then the older, then the family's half."""
    raw = _changed("glm4_moe", rope_theta=None, rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": inner})
    assert read_config({**raw, "partial_rotary_factor": top}).rotary_dims == dims


V3_NEEDS = ("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "first_k_dense_replace")


@pytest.mark.parametrize(
    ("family", "key"),
    [(family, key) for family in ("deepseek_v3", "kimi_k2") for key in (*V3_NEEDS, "n_shared_experts")]
    + [("deepseek_v2", "n_shared_experts")],
)
def test_an_absent_key_that_sources_read_differently_is_named(family, key):
    with pytest.raises(ConfigError, match=f"config.json has no {key!r}, which this family needs: add it"):
        read_config({k: v for k, v in QUICK[family].items() if k != key})


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_groups_that_are_asked_for_are_needed(key):
    raw = CASES_BY_NAME["deepseek_v2_groups"].config
    with pytest.raises(ConfigError, match=f"no {key!r}"):
        read_config({k: v for k, v in raw.items() if k != key})


def _without(family: str, *keys: str, **changes: Any) -> ModelConfig:
    return read_config({k: v for k, v in _changed(family, **changes).items() if k not in keys})


def test_absent_keys_mean_what_the_published_config_class_takes_them_for():
    """Of transformers 5."""
    rope = _without("gpt_oss", "rope_scaling").rope
    assert (rope.scaling, rope.factor, rope.original_max_position_embeddings) == ("yarn", 32.0, 4096)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate, rope.theta) == (32.0, 1.0, False, 150000.0)
    assert _without("gpt_oss", "rope_scaling", rope_parameters={"rope_type": "default"}).rope.scaling == "none"
    for family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        config = _without(family, "sliding_window", use_sliding_window=True, max_window_layers=1)
        assert set(config.sliding_windows) == ({4096} if family == "qwen3_moe" else {4096, None})
        assert set(_without(family, "sliding_window").sliding_windows) == {None}
        null = _changed(family, use_sliding_window=True, sliding_window=None)
        assert set(read_config(null).sliding_windows) == {None}
    glm = _without("glm4_moe", *V3_NEEDS, "n_shared_experts", "partial_rotary_factor")
    assert (glm.moe.num_groups, glm.moe.top_groups, glm.moe.norm_topk_prob) == (1, 1, True)
    assert (glm.moe.routed_scaling, glm.moe.shared_intermediate_size) == (1.0, glm.moe.intermediate_size)
    assert (glm.moe_layers, glm.rotary_dims) == ((False, True, True), 6)
    for family, mtp_layers in (("deepseek_v2", 0), ("deepseek_v3", 1), ("kimi_k2", 1), ("glm4_moe", 1)):
        assert _without(family, "num_nextn_predict_layers").mtp_layers == mtp_layers
        assert read_config(_changed(family, num_nextn_predict_layers=None)).mtp_layers == 0
        assert _without(family, "num_nextn_predict_layers", num_mtp_layers=2).mtp_layers == 2
    for family in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        assert _without(family, "q_lora_rank").mla.q_lora_rank == 1536
        assert read_config(_changed(family, q_lora_rank=None)).mla.q_lora_rank is None


@pytest.mark.parametrize(("layer", "may"), [(2, False), (3, True), (4, False), ("03", False), (10**12, False)])
def test_layers_of_multi_token_prediction_may_stand_unused(layer, may):
    config = read_config(_changed("glm4_moe", num_nextn_predict_layers=1))
    assert may_stand_unused(f"model.layers.{layer}.eh_proj.weight", config, CheckpointKeys()) == may


def test_all_unknown_keys_stand_in_one_error():
    with pytest.raises(ConfigError, match="'first_gate' = 1, 'second_gate' = 2"):
        read_config(_changed("qwen3_moe", second_gate=2, first_gate=1))


def test_the_two_forms_of_rope_mean_the_same():
    old = {k: v for k, v in QUICK["llama"].items() if k not in ("rope_scaling", "rope_theta")}
    newer = read_config({**old, "rope_parameters": {**SUPPORTED_LLAMA3, "rope_theta": 500000.0}})
    published = read_config({**old, "rope_scaling": SUPPORTED_LLAMA3, "rope_theta": 500000})
    assert newer == published
    assert published.rope.original_max_position_embeddings == 64


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_tiny_config_is_read(name):
    config = read_config(CASES_BY_NAME[name].config)
    assert config.family == CASES_BY_NAME[name].family
    assert len(config.moe_layers) == len(config.sliding_windows) == config.num_hidden_layers


# --- any JSON at all ---

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from([10**400, "", "yarn", "silu", "linear", "llama3", "full_attention", math.inf])
    | st.text(max_size=3)
)
_KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "quant_method", "x"])
_JSON = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3))
_NAMED = ("rope_scaling", "rope_parameters", "quantization_config", "layer_types", "mlp_only_layers", "torch_dtype")


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_value_in_a_config_gives_a_config_or_a_config_error(data):
    raw = dict(QUICK[data.draw(st.sampled_from(sorted(QUICK)))])
    for key in data.draw(st.lists(st.sampled_from([*sorted(raw), *_NAMED, "unheard_of"]), min_size=1, max_size=2)):
        raw[key] = data.draw(_JSON)
    try:
        config = read_config(raw)
    except ConfigError:
        return
    assert isinstance(config, ModelConfig)

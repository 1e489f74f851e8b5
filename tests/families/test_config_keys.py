"""Keys of config.json beside those that families read: passed, passed where they say what is done anyway, refused."""

from __future__ import annotations

import logging

import pytest

from jaxmoe import ConfigError
from jaxmoe.config import canonical_dtype
from jaxmoe.families import FAMILIES, quantizer_name, read_config
from jaxmoe.families.refused import _log_once
from jaxmoe.planner.sizes import count_parameters

from ..tiny.cases import QUICK_CASES

QUICK = {case.family: case.config for case in QUICK_CASES}
OWN_CODE = ("deepseek_v2", "deepseek_v3", "kimi_k2")


def _read(family, **changes):
    return read_config(QUICK[family] | changes)


def _without(family, *keys):
    return read_config({key: value for key, value in QUICK[family].items() if key not in keys})


GENERATION = {
    "temperature": 0.7, "top_k": 20, "top_p": 0.8, "typical_p": 1.0, "max_length": 20, "min_length": 0, "num_beams": 1,
    "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.05, "length_penalty": 1.0,
    "diversity_penalty": 0.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "do_sample": True,
    "early_stopping": True, "bad_words_ids": [[1]], "forced_eos_token_id": 2, "suppress_tokens": [1],
    "begin_suppress_tokens": [1], "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.1],
    "output_scores": True, "return_dict_in_generate": True, "cache_implementation": "hybrid", "num_labels": 2,
    "neftune_noise_alpha": 5,
}  # fmt: skip
STAMPS = {
    "_name_or_path": "/x", "_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "_commit_hash": "ab",
    "unsloth_fixed": True, "unsloth_version": "2025.1", "is_llama_config": True, "internal_version": 1,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "use_flash_attention": True, "prefix": "x",
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(QUICK))
def test_generation_settings_and_stamps_of_writers_pass_silently(family, caplog):
    assert _read(family, **GENERATION, **STAMPS) == read_config(QUICK[family])
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "key", "usual", "other"),
    [
        ("qwen3", "use_qk_norm", True, False),
        ("qwen3_moe", "use_qk_norm", True, False),
        ("qwen3_moe", "shared_expert_intermediate_size", 0, 64),
        ("qwen3_moe", "n_shared_experts", 0, 1),
        ("mixtral", "moe_frequency", 1, 2),
        ("qwen2_moe", "moe_layer_freq", 1, [0, 1]),
        ("llama", "is_causal", True, False),
    ],
)
def test_a_key_passes_at_what_the_family_does_anyway(family, key, usual, other):
    assert _read(family, **{key: usual}) == read_config(QUICK[family])
    with pytest.raises(ConfigError, match=f"'{key}' = "):
        _read(family, **{key: other})


@pytest.mark.parametrize(("value", "said"), [(False, "False"), (None, "null"), (0, "0"), ("no", "'no'")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3", "gpt_oss"])
def test_attention_in_both_directions_is_refused(family, value, said):
    """transformers takes null for false here."""
    with pytest.raises(ConfigError, match=f"'is_causal' = {said} makes attention bidirectional"):
        read_config(QUICK[family] | {"is_causal": value}, ignore=["is_causal"])


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "sliding_window", 4096),
        ("llama", "sliding_window", False),
        ("llama", "attention_chunk_size", 0),
        ("olmoe", "layer_types", []),
        ("mistral", "layer_types", ["sliding_attention"] * 3),
        ("mixtral", "layer_types", ["full_attention"] * 3),
        ("qwen3_moe", "layer_types", ["full_attention"] * 3),
    ],
)
def test_windows_and_kinds_of_layers_are_refused_where_a_family_has_none(family, key, value):
    assert _read(family, **{key: None}) is not None
    with pytest.raises(ConfigError, match=f"not supported: '{key}' = "):
        _read(family, **{key: value})


@pytest.mark.parametrize("family", sorted(QUICK))
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model", "ForRewardModel", "ForCausalLMEagle"])
def test_another_head_is_refused_by_name(family, head):
    own = FAMILIES[family].architectures[0]
    assert _read(family, architectures=[own.upper()]) == read_config(QUICK[family])  # LLaMAForCausalLM, too
    named = own.removesuffix("ForCausalLM") + head
    with pytest.raises(ConfigError, match=rf"has architectures \['{named}'\] instead of {own}; .* --ignore"):
        _read(family, architectures=[named])
    assert read_config(QUICK[family] | {"architectures": [named]}, ignore=["architectures"]) is not None


@pytest.mark.parametrize("family", sorted(QUICK))
def test_code_of_the_checkpoints_own_is_refused(family):
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert _read(family, auto_map={"AutoTokenizer": ["tokenization_x.X", None]}) == read_config(QUICK[family])
    if family in OWN_CODE:
        assert _read(family, auto_map=code) == read_config(QUICK[family])
        return
    with pytest.raises(ConfigError, match=r"custom modeling code \(auto_map .* --ignore-config-key auto_map$"):
        _read(family, auto_map=code)


def test_a_refusal_ends_in_one_paste():
    changes = {"architectures": ["LlamaModel"], "z gate": 1, "attn_scale": 2.0, "sequence_parallel": True}
    paste = "--ignore-config-key architectures --ignore-config-key attn_scale --ignore-config-key 'z gate'"
    with pytest.raises(ConfigError) as caught:
        _read("llama", **changes)
    assert str(caught.value).endswith(f"if harmless, pass ignore_config_keys, or {paste}")
    ignored = ["architectures", "attn_scale", "z gate"]
    assert read_config(QUICK["llama"] | changes, ignore=ignored) == read_config(QUICK["llama"])


def test_another_unknown_key_passes_with_one_line(caplog):
    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="jaxmoe"):
        for _ in range(2):
            assert _read("llama", max_sequence_length=2048) == read_config(QUICK["llama"])
    assert [record.message for record in caplog.records] == [
        "config.json: key 'max_sequence_length' = 2048 is unknown and ignored"
    ]
    for key in ("attn_logit_cap", "attention_sink_tokens", "mup_base", "logits_scaling", "residual_multiplier"):
        with pytest.raises(ConfigError, match=f"not supported: '{key}' = 1"):
            _read("llama", **{key: 1})


def test_not_understood_is_listed_where_nothing_is_run():
    notes: list[str] = []
    changes = {"hidden_act": "gelu", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_gate": 1}
    config = read_config(QUICK["qwen3"] | changes | {"is_causal": False}, not_understood=notes)
    assert notes == ["is_causal = False", "hidden_act = 'gelu'", "rope_scaling = 'dynamic'", "attn_gate = 1"]
    assert config.num_hidden_layers == read_config(QUICK["qwen3"]).num_hidden_layers


@pytest.mark.parametrize(
    ("family", "changes", "note"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"type": "linear"}}, None),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types = ['chunked_attention', 'chunked_attention', ",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types = ['sliding_attention', "),
        ("llama4_text", {"for_llm_compressor": True}, "for_llm_compressor = True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters = {'rope_type': 'linear', ",
        ),
        ("deepseek_v3", {"attention_bias": True}, None),
        ("deepseek_v3", {"moe_layer_freq": 2}, None),
        ("qwen3", {"use_qk_norm": False}, None),
    ],
)
def test_what_changes_no_size_is_listed_and_what_does_is_refused(family, changes, note):
    raw = QUICK[family] | changes
    with pytest.raises(ConfigError):
        read_config(raw)
    notes: list[str] = []
    if note is None:
        with pytest.raises(ConfigError):
            read_config(raw, not_understood=notes)
        return
    config = read_config(raw, not_understood=notes)
    assert [one[: len(note)] for one in notes] == [note]
    assert count_parameters(config) == count_parameters(read_config(QUICK[family]))


def test_values_in_errors_are_on_one_line_and_cut():
    with pytest.raises(ConfigError, match="'vocab_size' = a number of thousands of digits"):
        _read("llama", vocab_size=10**5000)
    with pytest.raises(ConfigError) as caught:
        _read("llama", attn_x="a\nb\x1b[31m", **{"attn\n\x1b": "c" * 1000})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert str(caught.value).endswith("or --ignore-config-key attn_x")
    with pytest.raises(ConfigError, match=r" and 9,990 more; .* and 9,990 more$") as caught:
        _read("llama", **{f"attn_{number}": number for number in range(10_000)})
    assert len(str(caught.value)) < 1000
    notes: list[str] = []
    read_config(QUICK["llama"] | {"attn_x": "a\nb\x1b[31m", "attn\n": 1}, not_understood=notes)
    assert notes == [r"'attn\n' = 1", r"attn_x = 'a\nb\x1b[31m'"]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "hidden_size", "a\nb" * 100),
        ("llama", "architectures", ["a\x1b[31m"] * 100),
        ("llama", "model_type", "a\nb" * 100),
        ("llama", "hidden_act", "a\nb" * 100),
        ("llama", "torch_dtype", "a\nb" * 100),
        ("llama", "attention_bias", "a\nb" * 100),
        ("llama", "quantization_config", {"quant_method": "a\nb" * 100}),
        ("llama", "quantization_config", {"a\nb" * 100: 1}),
        ("llama", "rope_scaling", {"type": "a\nb" * 100}),
        ("llama", "rope_scaling", {"a\nb" * 100: 1}),
        ("qwen3", "layer_types", ["a\nb"] * 10_000),
        ("qwen3_moe", "mlp_only_layers", ["a\nb"] * 10_000),
        ("deepseek_v3", "scoring_func", "a\nb" * 100),
        ("llama4_text", "no_rope_layers", ["a\nb"] * 10_000),
        ("llama4_text", "moe_layers", ["a\nb"] * 10_000),
    ],
)
def test_every_value_in_an_error_is_on_one_line_and_cut(family, key, value):
    with pytest.raises(ConfigError) as caught:
        _read(family, **{key: value})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "only 'silu' is supported: use a model that has it, or correct config.json"),
        ("deepseek_v3", {"topk_method": "x"}, "only 'noaux_tc' is supported: use a model that has it, or correct"),
        ("qwen3", {"use_qk_norm": False}, "only True is supported: use a model that has it, or correct config.json"),
    ],
)
def test_a_value_that_is_not_supported_has_a_remedy(family, changes, words):
    with pytest.raises(ConfigError, match=words):
        _read(family, **changes)


def test_what_the_text_part_says_of_another_model_is_looked_at():
    def whole(**changes):
        return {"model_type": "llama4", "text_config": QUICK["llama4_text"] | changes}

    for key, value, words in (
        ("quantization", {"group_size": 64, "bits": 4}, "'quantization' = .* is the format of MLX, which is not supp"),
        ("compression_config", {"config_groups": {}}, "'compression_config' = .* the format of compressed-tensors"),
        ("architectures", ["Llama4ForSequenceClassification"], "has architectures .* instead of Llama4ForC"),
        ("auto_map", {"AutoModel": "modeling_x.X"}, "custom modeling code"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_config(whole(**{key: value}))
    assert read_config(whole(architectures=["Llama4ForCausalLM"], auto_map={"AutoTokenizer": "x"})) is not None
    assert read_config(whole(architectures=["LlamaModel"]), ignore=["architectures"]) is not None


ABSENT_HEADS = ("mistral", "mixtral", "gpt_oss", "glm4_moe", "llama4_text", "qwen3_moe", "qwen2", "qwen3", "qwen2_moe")


@pytest.mark.parametrize("family", ABSENT_HEADS)
def test_absent_key_value_heads_are_needed_where_the_class_has_a_number_of_its_own(family):
    with pytest.raises(ConfigError, match=r"config.json has no 'num_key_value_heads', which this family needs: add it"):
        _without(family, "num_key_value_heads")
    assert _read(family, num_key_value_heads=None).num_key_value_heads == QUICK[family]["num_attention_heads"]


def test_what_the_first_llama_leaves_out():
    assert _without("llama", "max_position_embeddings").max_position_embeddings == 2048
    config = _without("llama", "num_key_value_heads")
    assert config.num_key_value_heads == QUICK["llama"]["num_attention_heads"]


@pytest.mark.parametrize("family", sorted(QUICK))
def test_swish_is_silu(family):
    assert _read(family, hidden_act="swish") == read_config(QUICK[family])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("float", "float32"),
     ("torch.float16", "float16"), ("torch.half", "float16")],
)  # fmt: skip
def test_dtypes_have_short_names(name, dtype):
    assert canonical_dtype(name) == dtype
    old = {key: value for key, value in QUICK["llama"].items() if key not in ("torch_dtype", "dtype")}
    assert read_config(old | {"torch_dtype": name}).dtype == read_config(old | {"dtype": name}).dtype == dtype


def test_dtypes_of_both_keys():
    """As transformers: dtype, the newer, counts."""
    assert canonical_dtype("int4") == "int4"
    assert _read("llama", dtype="bfloat16", torch_dtype="float16").dtype == "bfloat16"
    text = {key: value for key, value in QUICK["llama4_text"].items() if key not in ("torch_dtype", "dtype")}
    whole = {"model_type": "llama4", "dtype": "float16", "text_config": text | {"torch_dtype": None, "dtype": None}}
    assert read_config(whole).dtype == "float16"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": None}, "NVIDIA ModelOpt"),
        ({"producer": {"name": "modelopt", "version": "0.29"}}, "modelopt"),
        ({"config_groups": {}, "format": "float-quantized"}, "compressed-tensors"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
        ({"bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.1}, "GPTQ"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True}, "AWQ"),
        ({"rotation": "hadamard"}, "an unnamed tool (settings rotation)"),
    ],
)
def test_weights_without_quant_method_are_named_by_their_producer(settings, name):
    assert quantizer_name(settings) == name
    with pytest.raises(ConfigError) as caught:
        _read("qwen2", quantization_config=settings)
    assert f"has no quant_method, it is the format of {name}; supported are" in str(caught.value)


@pytest.mark.parametrize("ignore", [[], ["quantization"]])
def test_mlx_is_named_and_not_offered_to_be_ignored(ignore):
    raw = QUICK["qwen2"] | {"quantization": {"group_size": 64, "bits": 4}}
    with pytest.raises(
        ConfigError, match=r"'quantization' = .* is the format of MLX, which is not supported"
    ) as caught:
        read_config(raw, ignore=ignore)
    assert "ignore" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'compression_config' = .* is the format of compressed-tensors"):
        _read("qwen2", compression_config={"config_groups": {"group_0": {}}})

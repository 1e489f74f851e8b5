"""quantization_config is read strictly: what is kept follows from it, what is not known is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from jaxmoe.aot.request import InspectRequest
from jaxmoe.errors import ConfigError
from jaxmoe.families import read_config, with_weights_dtype
from jaxmoe.families.dtypes import KV_DTYPES, choose_dtypes, kv_array_dtype
from jaxmoe.quantization.formats import MXFP4, NVFP4, QuantizationFormat

from ..tiny.cases import CASES_BY_NAME
from ..tiny.quantized import FORMS

NAME = "qwen3_moe_mlp_only"
NVFP4_SETTINGS = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["model.layers.*.self_attn*"]}
ALL = {0: ["attention/out", "attention/qkv", "moe/experts/down", "moe/experts/gate_up"],
       1: ["attention/out", "attention/qkv", "mlp/down", "mlp/gate", "mlp/up"]}  # fmt: skip


def config_of(settings: Any, name: str = NAME, **keys):
    return read_config(CASES_BY_NAME[name].config | {"quantization_config": settings} | keys)


def kept(config, layer: int) -> list[str]:
    return sorted(config.quantization.of(layer))


def form(name: str, **keys) -> dict[str, Any]:
    return copy.deepcopy(FORMS[name][1]) | keys


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("fp8", QuantizationFormat(dtype="float8_e4m3fn", inputs=128, outputs=128)),
        ("int8-channel", QuantizationFormat(dtype="int8", inputs=None, outputs=1)),
        ("fp8-channel", QuantizationFormat(dtype="float8_e4m3fn", inputs=None, outputs=1)),
    ],
)
def test_matrices_of_layers_are_kept_as_published(name, format):
    config = config_of(form(name))
    assert config.quantization.format == config.checkpoint_quantization.format == format
    assert {layer: kept(config, layer) for layer in ALL} == ALL


def test_mxfp4_holds_experts_alone():
    config = config_of(form("mxfp4"), "mixtral_six_experts", hidden_size=96, intermediate_size=64)
    assert config.quantization.format == MXFP4
    assert kept(config, 0) == ["moe/experts/down", "moe/experts/gate_up"]


def test_nvfp4_is_read_to_be_planned_with_and_leaves_out_what_it_says():
    case = CASES_BY_NAME["mixtral_six_experts"].config | {"hidden_size": 96, "intermediate_size": 64}
    config = read_config(case | {"quantization_config": NVFP4_SETTINGS}, planned=True)
    assert config.quantization.format == config.checkpoint_quantization.format == NVFP4
    assert kept(config, 0) == ["moe/experts/down", "moe/experts/gate_up"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("fp8", "fp8 fp8-block"), ("int8-channel", "int8"), ("fp8-channel", "fp8"), ("mxfp4", "mxfp4")],
)
def test_the_name_of_the_published_format_keeps_it(name, words):
    moe = {"hidden_size": 96, "intermediate_size": 64} if name == "mxfp4" else {}
    config = config_of(form(name), "mixtral_six_experts" if moe else NAME, **moe)
    chosen = dict(dtype=None, kv_dtype=None)
    assert config.checkpoint_quantization.format.names == tuple(words.split())
    for word in words.split():
        assert choose_dtypes(config, weights_dtype=word, **chosen) == (config, config.dtype)
    with pytest.raises(ConfigError, match=r"weights_dtype=int8-block needs an unquantized checkpoint"):
        choose_dtypes(config, weights_dtype="int8-block", **chosen)


def test_an_empty_dtype_is_no_dtype():
    with pytest.raises(ConfigError, match=r"dtype='' must be one of"):
        choose_dtypes(config_of(form("fp8")), dtype="", weights_dtype=None, kv_dtype=None)


def test_blocks_of_packed_numbers_must_divide_inputs():
    case = CASES_BY_NAME["mixtral_six_experts"].config | {"hidden_size": 96, "intermediate_size": 56}
    with pytest.raises(ConfigError, match=r"56 inputs, not a multiple of the nvfp4 block size 16"):
        read_config(case | {"quantization_config": NVFP4_SETTINGS}, planned=True)
    with pytest.raises(ConfigError, match=r"moe/experts/down has 44 inputs.*block size 32"):
        config_of(form("mxfp4"), "mixtral_six_experts", hidden_size=96)


@pytest.mark.parametrize(
    ("name", "ignored", "layer", "left"),
    [
        ("fp8", ["model.layers.0.self_attn.q_proj"], 0, ["moe/experts/down", "moe/experts/gate_up", "attention/out"]),
        ("fp8", ["model.layers.0.self_attn"], 0, ["moe/experts/down", "moe/experts/gate_up"]),
        ("fp8", ["model.layers.0.self_att"], 0, ALL[0]),  # not up to a dot
        ("fp8", ["down_proj"], 1, ["attention/out", "attention/qkv", "mlp/gate", "mlp/up"]),
        ("int8-channel", ["re:.*experts\\.[3-5]\\.up_proj"], 0, ["attention/out", "attention/qkv", "moe/experts/down"]),
        ("int8-channel", ["model.layers.0"], 0, ALL[0]),  # the whole name alone
    ],
)
def test_modules_that_are_left_out_are_plain(name, ignored, layer, left):
    key = "modules_to_not_convert" if name == "fp8" else "ignore"
    assert kept(config_of(form(name, **{key: ignored})), layer) == sorted(left)


def compressed(**weights) -> dict[str, Any]:
    settings = form("int8-channel")
    settings["config_groups"]["group_0"]["weights"] |= weights
    return settings


def grouped(**keys) -> dict[str, Any]:
    settings = form("int8-channel")
    settings["config_groups"]["group_0"] |= keys
    return settings


def test_what_compressed_tensors_writes_beside_a_format_is_passed_over():
    settings = compressed(
        observer="minmax", observer_kwargs={"a": 1}, group_size=None, actorder=None, block_structure=None,
        scale_dtype=None, zp_dtype="torch.int8",
    )  # fmt: skip
    settings["config_groups"]["group_0"] |= {"format": "int-quantized", "output_activations": None}
    settings |= {
        "version": "0.13.0", "global_compression_ratio": 1.2, "kv_cache_scheme": None, "transform_config": {},
        "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"},
    }  # fmt: skip
    assert config_of(settings) == config_of(form("int8-channel"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (NVFP4_SETTINGS, "quant_method 'modelopt', which can be sized and planned (jaxmoe info, jaxmoe plan) but not"),
        (NVFP4_SETTINGS | {"quant_algo": "FP8"}, "quant_algo 'FP8'; only 'NVFP4' is supported"),
        (NVFP4_SETTINGS | {"group_size": 32}, "group_size 32; only 16"),
        (NVFP4_SETTINGS | {"rotation": "hadamard"}, "'rotation' = 'hadamard'"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'; supported are fp8, mxfp4, compressed-tensors"),
        ({"bits": 4}, "no quant_method, it is the format of an unnamed tool (settings bits)"),
        ("int8", "quant_method 'int8'"),
        (form("fp8", weight_block_size=None), "weight_block_size null; two whole numbers"),
        (form("fp8", weight_block_size=[128, 0]), "weight_block_size [128, 0]"),
        (form("fp8", activation_scheme="static"), "activation_scheme 'static'; only 'dynamic'"),
        (form("fp8", fmt="e5m2"), "fmt 'e5m2'; only 'e4m3'"),
        (form("fp8", rotation="hadamard"), "'rotation' = 'hadamard'"),
        (form("fp8", modules_to_not_convert="lm_head"), "modules_to_not_convert 'lm_head'; it must be a list"),
        (compressed(strategy="group", group_size=128), "strategy 'group'"),
        (compressed(strategy="tensor"), "strategy 'tensor'"),
        (compressed(num_bits=4), "num_bits 4"),
        (compressed(symmetric=False), "symmetric False"),
        (form("int8-channel", format="pack-quantized"), "format 'pack-quantized' of type 'int'"),
        (form("int8-channel", config_groups={}), "one group in config_groups"),
        (form("int8-channel", kv_cache_scheme={"num_bits": 8}), "has kv_cache_scheme"),
        (form("int8-channel", ignore=["re:("]), "not a valid pattern"),
        (form("int8-channel", rotation="hadamard"), "'rotation' = 'hadamard'"),
        (form("int8-channel", sparsity_config={"sparsity_structure": "2:4"}), "has sparsity_config"),
        (compressed(zero_point=3), "'zero_point' = 3"),
        (compressed(group_size=64), "'group_size' = 64"),
        (compressed(actorder="group"), "'actorder' = 'group'"),
        (grouped(format="pack-quantized"), "format 'int-quantized' and 'pack-quantized' of type 'int'"),
        (grouped(rotation="hadamard"), "'rotation' = 'hadamard'"),
    ],
)
def test_what_is_not_known_is_one_line(settings, words):
    with pytest.raises(ConfigError) as caught:
        config_of(settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_dtype_says_what_is_kept():
    plain = read_config(CASES_BY_NAME[NAME].config)
    assert plain.quantization is None
    assert {layer: kept(with_weights_dtype(plain, "fp8-block"), layer) for layer in ALL} == ALL
    quantized = config_of(form("fp8"))
    assert with_weights_dtype(quantized, None) == quantized
    assert with_weights_dtype(quantized, "bfloat16").quantization is None
    with pytest.raises(
        ConfigError, match=r"weights_dtype=int8 needs an unquantized checkpoint, but this one has quant_method 'fp8'"
    ):
        with_weights_dtype(quantized, "int8")
    with pytest.raises(ConfigError, match=r"weights_dtype='int4' must be one of float32, .*fp8-block"):
        with_weights_dtype(plain, "int4")


ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


@pytest.mark.parametrize("alias", ALIASES)
def test_short_names_of_dtypes_are_the_long_ones(alias):
    config, name = config_of(form("fp8")), ALIASES[alias]
    asked = {"dtype": None, "weights_dtype": None, "kv_dtype": None}
    for option in ("dtype", "weights_dtype"):
        short, long = (choose_dtypes(config, **asked | {option: one}) for one in (alias, name))
        assert short == long
        assert short[1] == name
    choose_dtypes(config, dtype=name, weights_dtype=alias, kv_dtype=None)  # the same twice
    if name in KV_DTYPES:
        choose_dtypes(config, **asked | {"kv_dtype": alias})
        assert kv_array_dtype(alias) == name
    question = InspectRequest.of(
        model="", mesh="", max_num_seqs=1, context=1, dtype=alias, weights_dtype=alias, kv_dtype=alias
    )
    options = question.engine.options()
    assert [options[option] for option in asked] == [name, name, name]

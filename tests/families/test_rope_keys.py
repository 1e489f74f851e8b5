"""Rotary embedding as config.json has it: each number is transformers' own (5.24, LlamaRotaryEmbedding, head of 16)."""

from __future__ import annotations

import pytest

from jaxmoe import ConfigError
from jaxmoe.families import read_config
from jaxmoe.ops.pointwise import inverse_frequencies
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config

from ..tiny.cases import QUICK_CASES

QUICK = {case.family: case.config for case in QUICK_CASES}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SHARPER, _LAST = 1.138629436111989, (0.0025, 0.0007905695, 0.00025, 7.905695e-05)
_PLAIN = {
    key: value
    for key, value in QUICK["llama"].items()
    if key not in ("rope_scaling", "rope_parameters", "rope_theta", "head_dim", "num_key_value_heads")
} | {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def _read(**changes):
    return read_config(_PLAIN | changes)


@pytest.mark.parametrize(
    ("changes", "first", "factor", "context"),
    [
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
            (1, 0.1976424, 0.025, 0.007905695), 4, 128,
        ),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 32, "truncate": None}},
            (1, 0.1484903, 0.025, 0.007905695), 4, 128,
        ),
        ({"rope_scaling": YARN}, (1, 0.2371708, 0.05, 0.007905695), 4, 256),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": None}},
            (1, 0.2371708, 0.05, 0.007905695), 4, 256,
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            (1, 0.1976424, 0.025, 0.007905695), 4, 128,
        ),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 32},
            (1, 0.1976424, 0.025, 0.007905695), 4, 128,
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
            (1, 0.07905694, 0.025, 0.007905695), 4, 64,
        ),
        ({"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": None}}, (1, 0.2371708, 0.05, 0.007905695), 4, 256),
        ({"rope_scaling": {**YARN, "finetuned": True}}, (1, 0.2371708, 0.05, 0.007905695), 4, 256),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_fast": 32}},
            (1, 0.2371708, 0.05, 0.007905695), 4, 256,
        ),
    ],
)  # fmt: skip
def test_yarn_is_what_transformers_computes(changes, first, factor, context):
    config = _read(**changes)
    assert inverse_frequencies(config.rope, 16) == pytest.approx([*first, *_LAST], rel=2e-6)
    assert config.rope.attention_factor == pytest.approx(_SHARPER, rel=1e-12)
    assert (config.rope.factor, config.max_position_embeddings) == (factor, context)


def test_llama3_and_linear_are_what_transformers_computes():
    config = _read(rope_scaling=LLAMA3)
    expected = [1, 0.2443846, 0.01304226, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05]
    assert inverse_frequencies(config.rope, 16) == pytest.approx(expected, rel=2e-6)
    assert (config.rope.original_max_position_embeddings, config.max_position_embeddings) == (64, 64)
    config = _read(rope_scaling={"type": "linear", "factor": 2.0})
    expected = [0.5, 0.1581139, 0.05, 0.01581139, 0.005, 0.001581139, 0.0005, 0.0001581139]
    assert inverse_frequencies(config.rope, 16) == pytest.approx(expected, rel=2e-6)
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, r"lacks the numbers \['factor'\]: add them"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "of rope_type 'linear' has 'factor' = '2': give a finite number, without quotes",
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            r"'rope_scaling' has \['factor'\] and no rope_type: add it \(linear, llama3, yarn\), or leave them out",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
            r"unsupported keys \['factor'\] for rope_type 'default': leave them out, or give linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "ntk"}},
            "'rope_parameters' has rope_type 'ntk'; .*: use a model with one of",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 128}},
            "=64 divided by original_max_position_embeddings=128, 0.5, which must be at least 1: give a factor",
        ),
        ({"rope_scaling": {"type": "linear", "factor": None}}, r"lacks the numbers \['factor'\]"),
        ({"rope_scaling": {**YARN, "factor": 1e12}}, "makes a context of 6.4e"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "=0 must be above 0 for rope_type yarn"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "'truncate' = 1 must be true, false or null"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has rope_type 'dynamic'; supported are"),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "differ in factor: keep one of them"),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 5e5}},
            "differ in rope_theta: keep one of them",  # of which transformers would take 10000
        ),
    ],
)
def test_what_cannot_be_is_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        _read(**changes)


_TO_256 = {"max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("changes", "rope_scaling", "rope_parameters"),
    [
        ({}, {"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}),
        ({}, YARN, {**YARN, "rope_theta": 10000.0}),
        ({}, YARN, {**YARN, "attention_factor": _SHARPER}),
        ({}, YARN, {**YARN, "beta_fast": 0, "truncate": True, "mscale": None, "original_max_position_embeddings": 64}),
        (
            _TO_256,
            {"type": "yarn", "factor": None, "original_max_position_embeddings": 64},
            {**YARN, "original_max_position_embeddings": 64},
        ),
        ({}, LLAMA3, {**LLAMA3, "original_max_position_embeddings": 64}),
        ({}, {"rope_type": "default"}, {"rope_theta": 10000}),
    ],
)
def test_two_forms_that_mean_the_same_are_one(changes, rope_scaling, rope_parameters):
    config = _read(**changes, rope_scaling=rope_scaling, rope_parameters=rope_parameters)
    assert config == _read(**changes, rope_scaling=rope_scaling) == _read(**changes, rope_parameters=rope_parameters)


def test_two_forms_that_differ_in_what_deepseek_reads_alone():
    scaling = {**YARN, "mscale": 0.5, "original_max_position_embeddings": 64}
    changes = {"rope_scaling": scaling, "rope_parameters": {**scaling, "mscale_all_dim": 0}}
    raw = QUICK["deepseek_v3"] | {"rope_theta": 10000.0}
    assert read_config(raw | changes) == read_config(raw | {"rope_scaling": scaling})
    changes["rope_parameters"] = {**scaling, "mscale": None, "mscale_all_dim": 1.0}
    with pytest.raises(ConfigError, match="differ in mscale_all_dim: keep one of them"):
        read_config(raw | changes)


def test_the_context_of_published_configs_is_not_lengthened_twice():
    for name, context in (("deepseek-v3", 163840), ("kimi-k2", 131072), ("gpt-oss-20b", 131072)):
        assert read_config(read_json(find_config(name)), planned=True).max_position_embeddings == context


def test_deepseek_sharpens_by_the_ratio_where_the_factor_is_null():
    raw = QUICK["deepseek_v3"] | {"max_position_embeddings": 128}
    scaling = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}
    null, given = (read_config(raw | {"rope_scaling": scaling | {"factor": factor}}) for factor in (None, 4.0))
    assert null == given

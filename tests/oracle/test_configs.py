"""Reading config.json against transformers here and now: counts of published ones, its classes' defaults, YaRN."""

from __future__ import annotations

import json

import pytest

from jaxmoe.families import FAMILIES, read_config
from jaxmoe.ops.pointwise import inverse_frequencies
from jaxmoe.planner.sizes import count_parameters

from ..families.counts import PUBLISHED, transformers_config, transformers_count

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
ROWS = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
SOME = {row["config"]["model_type"]: row for row in ROWS if "parameters" in row}  # one of each family
# What a file needs beside the class's defaults: DeepSeek's own code and transformers take other things for these.
_NEEDED = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm4_moe": {"head_dim": 128},  # without which 96 heads do not divide its 4096
}


@pytest.mark.parametrize("family", sorted(SOME))
def test_the_stored_count_is_what_transformers_says(family):
    assert transformers_count(transformers_config(SOME[family]["config"])) == SOME[family]["parameters"]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"kimi_k2", "llama4"}))
def test_what_the_class_writes_of_its_defaults_is_read(family):
    """Every key of a file that transformers 5 saves is known, and none means another size."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **_NEEDED.get(family, {}))
    raw = json.loads(json.dumps(config.to_dict(), default=str))
    assert raw["model_type"] == family
    assert count_parameters(read_config(raw)).total == transformers_count(config)


SCALINGS = [
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": None},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.1},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"type": "linear", "factor": 2.0},
]


@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 48}])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rotary_embedding_is_that_of_transformers(scaling, beside):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 99,
        "max_position_embeddings": 64, "rope_theta": 5e5, **beside,
    }  # fmt: skip
    oracle = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_scaling=dict(scaling)))
    rope = read_config({"model_type": "llama", **sizes, "rope_scaling": scaling}).rope
    assert inverse_frequencies(rope, 16) == pytest.approx(oracle.inv_freq.numpy(), rel=2e-6)
    assert rope.attention_factor == pytest.approx(oracle.attention_scaling, rel=1e-12)

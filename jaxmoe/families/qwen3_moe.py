"""Qwen3-MoE: Qwen3's attention and an MoE without a shared expert. Source: Hugging Face's Qwen3MoeConfig."""

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.families.decoder import read_decoder, read_sparse_layers, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader, read_num_experts


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Qwen3-MoE; decoder_sparse_step and mlp_only_layers may make layers dense."""
    shared = read_decoder(reader)
    reader.expect("use_qk_norm", True, sized=True)  # always true in these models
    layers = shared["num_hidden_layers"]
    bias = reader.flag("attention_bias")
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_experts", "num_local_experts"),  # published files use either name
        num_experts_per_tok=reader.whole("num_experts_per_tok"),
        intermediate_size=reader.whole("moe_intermediate_size"),
        norm_topk_prob=reader.flag("norm_topk_prob", False),
    )
    return ModelConfig(
        family="qwen3_moe",
        **shared,
        moe=moe,
        moe_layers=read_sparse_layers(reader, num_layers=layers),
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="every layer", switched=True, typed=False, absent=4096
        ),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
    )


FAMILY = ModelFamily(name="qwen3_moe", read=read, architectures=("Qwen3MoeForCausalLM",))

"""Qwen1.5-MoE and Qwen2-MoE: a shared expert with a sigmoid gate. Source: Hugging Face's Qwen2MoeConfig."""

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.families.decoder import read_decoder, read_sparse_layers, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader, read_num_experts


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Qwen2-MoE.

    decoder_sparse_step and mlp_only_layers may make layers dense. q, k and v have biases unless qkv_bias is false.
    """
    shared = read_decoder(reader)
    layers = shared["num_hidden_layers"]
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok"),
        intermediate_size=reader.whole("moe_intermediate_size"),
        norm_topk_prob=reader.flag("norm_topk_prob", False),
        shared_intermediate_size=reader.whole("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return ModelConfig(
        family="qwen2_moe",
        **shared,
        moe=moe,
        moe_layers=read_sparse_layers(reader, num_layers=layers),
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="even below max_window_layers", switched=True, typed=True, absent=4096
        ),
        qkv_bias=reader.flag("qkv_bias", True),
    )


FAMILY = ModelFamily(name="qwen2_moe", read=read, architectures=("Qwen2MoeForCausalLM",))

"""GLM-4.5: half of each head rotated, optional QK norms, DeepSeek-V3's routing. Source: Hugging Face, Glm4MoeConfig."""

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.families.decoder import (
    read_decoder,
    read_dense_prefix,
    read_mtp_layers,
    read_shared_experts,
    read_sigmoid_routing,
)
from jaxmoe.families.deepseek import NAMES
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader, read_num_experts


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of GLM-4.5.

    attention_bias adds a bias to q, k and v; use_qk_norm adds a norm over each query and key head.
    """
    shared = read_decoder(reader, default_eps=1e-5, default_partial=0.5)
    layers, width = shared["num_hidden_layers"], reader.whole("moe_intermediate_size")
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "n_routed_experts", "num_local_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=read_shared_experts(reader, width, default=1),
        routed_scaling=reader.number("routed_scaling_factor", 1.0),
        **read_sigmoid_routing(reader, groups=1, normed=True),
    )
    return ModelConfig(
        family="glm4_moe",
        **shared,
        moe=moe,
        moe_layers=read_dense_prefix(reader, num_layers=layers, default=1),
        sliding_windows=(None,) * layers,
        qkv_bias=reader.flag("attention_bias"),
        qk_norm="head" if reader.flag("use_qk_norm") else "none",
        mtp_layers=read_mtp_layers(reader, absent=1),
    )


FAMILY = ModelFamily(name="glm4_moe", read=read, names=NAMES, architectures=("Glm4MoeForCausalLM",))

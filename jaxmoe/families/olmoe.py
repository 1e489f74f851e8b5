"""OLMoE: norms over the whole query and key, optional clipping of q, k and v. Source: Hugging Face's OlmoeConfig."""

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.families.decoder import read_decoder
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader, read_num_experts


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of OLMoE: every layer is MoE, with experts of width intermediate_size."""
    shared = read_decoder(reader, default_eps=1e-5, absent_kv_heads="as heads")
    reader.expect("use_qk_norm", True, sized=True)
    layers = shared["num_hidden_layers"]
    bias = reader.flag("attention_bias")
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok", 8),
        intermediate_size=shared["intermediate_size"],
        norm_topk_prob=reader.flag("norm_topk_prob", False),
    )
    return ModelConfig(
        family="olmoe",
        **shared,
        moe=moe,
        moe_layers=(True,) * layers,
        sliding_windows=(None,) * layers,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        clip_qkv=reader.number("clip_qkv", None),
    )


FAMILY = ModelFamily(name="olmoe", read=read, architectures=("OlmoeForCausalLM",))

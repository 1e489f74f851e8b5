"""GPT-OSS: attention sinks, windows in every other layer, biases throughout, a clamped SwiGLU, YaRN.

Source: Hugging Face's GptOssConfig and modeling_gpt_oss.
"""

from jaxmoe.config import ModelConfig, MoEConfig, SwiGLUClamp
from jaxmoe.families.decoder import read_decoder, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import ConfigReader, read_agreed, read_num_experts

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of GPT-OSS.

    Every layer is MoE, with experts of width intermediate_size. The weights of the chosen experts sum to 1.
    """
    shared = read_decoder(reader, default_eps=1e-5, default_theta=150000.0, default_head_dim=64, default_scaling=_YARN)
    layers = shared["num_hidden_layers"]
    bias = reader.flag("attention_bias", True)
    reader.get("initial_context_length", None)  # rope_scaling repeats it
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_local_experts", "num_experts"),
        num_experts_per_tok=read_agreed(reader, "experts per token", "num_experts_per_tok", "experts_per_token"),
        intermediate_size=shared["intermediate_size"],
        norm_topk_prob=True,
        top_k_of="logits",
        router_bias=True,
        biases=True,
        clamp=SwiGLUClamp(limit=reader.number("swiglu_limit", 7.0), alpha=reader.number("swiglu_alpha", 1.702)),
    )
    return ModelConfig(
        family="gpt_oss",
        **shared,
        moe=moe,
        moe_layers=(True,) * layers,
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="even layers", switched=False, typed=True, absent=128
        ),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
    )


NAMES = CheckpointKeys(router="router", fused="interleaved")
FAMILY = ModelFamily(name="gpt_oss", read=read, names=NAMES, architectures=("GptOssForCausalLM",))

"""Llama 2 and 3.x. Source: Hugging Face's LlamaConfig and modeling_llama (keys and defaults)."""

from jaxmoe.config import ModelConfig
from jaxmoe.families.decoder import read_decoder
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Llama: full attention and dense MLPs.

    A file without max_position_embeddings, as for Llama 1, means 2048. attention_bias adds a bias to q, k, v and o;
    mlp_bias adds one to gate, up and down.
    """
    shared = read_decoder(reader, absent_kv_heads="as heads", absent_positions=2048)
    layers = shared["num_hidden_layers"]
    bias = reader.flag("attention_bias")
    return ModelConfig(
        family="llama",
        **shared,
        moe_layers=(False,) * layers,
        sliding_windows=(None,) * layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
    )


FAMILY = ModelFamily(name="llama", read=read, architectures=("LlamaForCausalLM",))

"""Llama 2 and 3.x. Source: Hugging Face's LlamaConfig and modeling_llama (keys and defaults)."""

from jaxmoe.config import ModelConfig
from jaxmoe.families.family import Family
from jaxmoe.families.reader import ConfigReader, read_decoder


def read(reader: ConfigReader) -> ModelConfig:
    """Full attention, dense MLP; attention_bias puts a bias on q, k, v and o, mlp_bias on gate, up and down."""
    shared = read_decoder(reader)
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


FAMILY = Family(name="llama", read=read)

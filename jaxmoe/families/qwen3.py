"""Qwen3: an RMS norm over each query and key head. Source: Hugging Face's Qwen3Config and modeling_qwen3."""

from jaxmoe.config import ModelConfig
from jaxmoe.families.decoder import read_decoder, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Qwen3: dense layers, with a head_dim of 128 by default."""
    shared = read_decoder(reader, default_head_dim=128)
    reader.expect("use_qk_norm", True, sized=True)  # always true in these models
    layers = shared["num_hidden_layers"]
    bias = reader.flag("attention_bias")
    return ModelConfig(
        family="qwen3",
        **shared,
        moe_layers=(False,) * layers,
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="from max_window_layers", switched=True, typed=True, absent=4096
        ),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
    )


FAMILY = ModelFamily(name="qwen3", read=read, architectures=("Qwen3ForCausalLM",))

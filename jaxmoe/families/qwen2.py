"""Qwen2 and Qwen2.5: biases on q, k and v, but not on o. Source: Hugging Face's Qwen2Config and modeling_qwen2."""

from jaxmoe.config import ModelConfig
from jaxmoe.families.decoder import read_decoder, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Qwen2: dense layers.

    With use_sliding_window, the layers from max_window_layers on have a sliding window.
    """
    shared = read_decoder(reader)
    layers = shared["num_hidden_layers"]
    return ModelConfig(
        family="qwen2",
        **shared,
        moe_layers=(False,) * layers,
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="from max_window_layers", switched=True, typed=True, absent=4096
        ),
        qkv_bias=True,
    )


FAMILY = ModelFamily(name="qwen2", read=read, architectures=("Qwen2ForCausalLM",))

"""Mistral: Llama with a sliding window in every layer. Source: Hugging Face's MistralConfig."""

from jaxmoe.config import ModelConfig
from jaxmoe.families.decoder import read_decoder, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.reader import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Mistral.

    sliding_window null means full attention; an absent key means 4096, the published default.
    """
    shared = read_decoder(reader)
    layers = shared["num_hidden_layers"]
    return ModelConfig(
        family="mistral",
        **shared,
        moe_layers=(False,) * layers,
        sliding_windows=read_windows(
            reader, num_layers=layers, rule="every layer", switched=False, typed=False, absent=4096
        ),
    )


FAMILY = ModelFamily(name="mistral", read=read, architectures=("MistralForCausalLM",))

"""Mixtral: Mistral with an MoE in every layer. Source: Hugging Face's MixtralConfig and modeling_mixtral."""

from jaxmoe.config import ModelConfig, MoEConfig
from jaxmoe.families.decoder import read_decoder, read_windows
from jaxmoe.families.family import ModelFamily
from jaxmoe.families.keys import CheckpointKeys
from jaxmoe.families.reader import ConfigReader, read_num_experts


def read(reader: ConfigReader) -> ModelConfig:
    """Read the config of Mixtral: every layer is MoE, and the weights of the chosen experts sum to 1."""
    shared = read_decoder(reader, default_theta=1e6, default_eps=1e-5)
    layers = shared["num_hidden_layers"]
    moe = MoEConfig(
        num_experts=read_num_experts(reader, "num_local_experts"),
        num_experts_per_tok=reader.whole("num_experts_per_tok"),
        intermediate_size=shared["intermediate_size"],
        norm_topk_prob=True,
    )
    return ModelConfig(
        family="mixtral",
        **shared,
        moe=moe,
        moe_layers=(True,) * layers,
        sliding_windows=read_windows(reader, num_layers=layers, rule="every layer", switched=False, typed=False),
    )


NAMES = CheckpointKeys(
    moe="block_sparse_moe",
    stacked_moe="mlp",
    expert_gate="experts.{e}.w1",
    expert_up="experts.{e}.w3",
    expert_down="experts.{e}.w2",
)
FAMILY = ModelFamily(name="mixtral", read=read, names=NAMES, architectures=("MixtralForCausalLM",))

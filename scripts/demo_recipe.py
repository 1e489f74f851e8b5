"""The embedded model of checkpoints/demo and the recipe it is trained by."""

from jaxmoe.config import ModelConfig, MoEConfig, RopeConfig
from jaxmoe.train.recipe import TrainingRecipe

DEMO_LAYERS = 5


DEMO_MODEL = ModelConfig(
    family="qwen3_moe",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=DEMO_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    moe_layers=(True,) * DEMO_LAYERS,
    sliding_windows=(None,) * DEMO_LAYERS,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=128, norm_topk_prob=True),
    qk_norm="head",
    tie_word_embeddings=True,
)


DEMO_RECIPE = TrainingRecipe(model=DEMO_MODEL)

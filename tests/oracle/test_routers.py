"""Every family's router at the ends of float32, against transformers' own module on the same logits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.families import read_config
from jaxmoe.ops.pointwise import BACKENDS, RouteRule, route

from ..ops.test_linear import compiler_found
from ..tiny.cases import CASES_BY_NAME

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ROUTERS = {
    "llama4_text_scout": ("llama4", "Llama4Router"),
    "gpt_oss_window": ("gpt_oss", "GptOssTopKRouter"),
    "deepseek_v2_groups": ("deepseek_v2", "DeepseekV2TopkRouter"),
    "deepseek_v3_groups": ("deepseek_v3", "DeepseekV3TopkRouter"),
    "glm4_moe_groups": ("glm4_moe", "Glm4MoeTopkRouter"),
    "mixtral_six_experts": ("mixtral", "MixtralTopKRouter"),
    "qwen2_moe_shared": ("qwen2_moe", "Qwen2MoeTopKRouter"),
    "qwen3_moe_norm": ("qwen3_moe", "Qwen3MoeTopKRouter"),
    "olmoe_full_norm": ("olmoe", "OlmoeTopKRouter"),
}


def published_weights(name: str, logits: np.ndarray) -> np.ndarray:
    """Weights [T,E] of transformers' router whose matrix is the identity."""
    import importlib

    import torch
    from transformers import CONFIG_MAPPING

    family, router = ROUTERS[name]
    case = CASES_BY_NAME[name]
    experts = logits.shape[1]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = CONFIG_MAPPING[case.family].from_dict(case.config | heads | {"hidden_size": experts})
    made = getattr(module, router)(config)
    with torch.no_grad():
        made.weight.copy_(torch.eye(experts))
        if getattr(made, "bias", None) is not None:
            made.bias.zero_()
        found = made(torch.tensor(logits))
    if name.startswith("llama4"):
        return found[0].numpy()
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, found[2].numpy(), found[1].float().numpy(), axis=1)
    return weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_those_of_transformers(name, backend):
    """Logits far apart and far from zero, no two of a token's scores alike unless they are too small to matter."""
    if backend == "native" and not compiler_found():
        return
    moe = read_config(CASES_BY_NAME[name].config).moe
    rng = np.random.default_rng(0)
    logits = np.concatenate(
        [rng.normal(offset, spread, (40, moe.num_experts)) for offset in (0, 40, -55) for spread in (1, 6, 60)]
    ).astype(np.float32)
    if moe.scoring == "sigmoid" and moe.top_k_of == "scores":  # ties of scores that are 1 are anyone's to break
        logits = np.minimum(logits, 12 + np.arange(moe.num_experts, dtype=np.float32) / 4)
    active = jnp.ones(len(logits), bool)
    found, _ = route(jnp.array(logits), active, None, rule=RouteRule.of(moe), backend=backend)
    np.testing.assert_allclose(found, published_weights(name, logits), rtol=1e-4, atol=1e-30)

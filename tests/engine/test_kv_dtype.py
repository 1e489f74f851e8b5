"""Keys and values kept in fewer bits: near what full ones give, the same on every mesh, and smaller."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.errors import ConfigError

from ..conftest import ONE_DEVICE, mesh_of

CASE = "qwen3_moe_norm"
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 4, 1, 4, 2, 1, 3, 5, 6, 2, 3, 7]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
NEAR = {"float32": 1e-5, "bfloat16": 0.01, "fp8": 0.15, "int8": 0.03}  # of logprobs, on average


def load(tiny_dir, kv_dtype, mesh=ONE_DEVICE, **options) -> LLM:
    return LLM.load(tiny_dir(CASE), mesh=mesh_of(mesh), dtype="float32", kv_dtype=kv_dtype, **options)


@pytest.mark.parametrize("kv_dtype", NEAR)
def test_logprobs_stay_near_those_of_full_precision(kv_dtype, tiny_dir, tiny_llm):
    """The engine reads every key and value from pages; score keeps none."""
    reference = tiny_llm(CASE, ONE_DEVICE)
    for out in load(tiny_dir, kv_dtype).generate(PROMPTS, PARAMS):
        (scored,) = reference.score([out.prompt_token_ids + out.token_ids])
        assert np.abs(out.logprobs - scored[-12:]).mean() <= NEAR[kv_dtype]


@pytest.mark.parametrize("kv_dtype", [pytest.param("fp8", marks=pytest.mark.sweep), "int8"])
def test_every_mesh_and_kernel_gives_the_same(kv_dtype, tiny_dir):
    wanted = load(tiny_dir, kv_dtype, kernels={"attention": "loop"}).generate(PROMPTS, PARAMS)
    for found in (
        load(tiny_dir, kv_dtype, "data=2,tensor=2,expert=2", kernels={"attention": "loop"}).generate(PROMPTS, PARAMS),
        load(tiny_dir, kv_dtype).generate(PROMPTS, PARAMS),
    ):
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=0.02)


def test_bytes_of_a_token_count_numbers_and_scales(tiny_dir):
    runners = {kv_dtype: load(tiny_dir, kv_dtype)._runner for kv_dtype in NEAR}
    config = runners["float32"].config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    sizes = {name: runner.bytes_per_token for name, runner in runners.items()}
    assert sizes == {
        "float32": heads * config.head_dim * 4, "bfloat16": heads * config.head_dim * 2,
        "fp8": heads * (config.head_dim + 4), "int8": heads * (config.head_dim + 4),
    }  # fmt: skip
    for runner in runners.values():
        state = runner.empty_state(2, 3, 4)
        held = sum(array.nbytes for array in jax.tree.leaves(state.pages))
        assert held == runner.bytes_per_token * 3 * 4


def test_an_unknown_kind_is_named(tiny_dir):
    with pytest.raises(ConfigError, match="kv_dtype='int4' must be one of float32, bfloat16, fp8, int8"):
        load(tiny_dir, "int4")

"""Layers that repeat in periods of several, and layers by themselves: the same model whichever way they lie."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.depth import segments
from jaxmoe.model.kernels import Kernels

from ..conftest import mesh_of

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2, 7, 1]]
ALTERNATING = {
    "qwen3_moe_sparse_step": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": ()},
    "qwen2_layer_types": {"num_hidden_layers": 4, "layer_types": ("full_attention", "sliding_attention") * 2},
}


@pytest.fixture(params=sorted(ALTERNATING))
def directory(request, changed_dir):
    return changed_dir(request.param, **ALTERNATING[request.param])


def results(directory, mesh: str, layers: str):
    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="float32", kernels=Kernels(layers=layers))
    tokens = [out.token_ids for out in llm.generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))]
    return llm, tokens, llm.last_logits(PROMPTS)


def test_a_period_of_two_layers_means_what_layers_by_themselves_do(directory):
    by_itself, wanted, logits = results(directory, "data=1", "unroll")
    assert len(by_itself.runner.parts) == by_itself.config.num_hidden_layers
    for mesh in ("data=1", "tensor=2,expert=2"):
        llm, tokens, found = results(directory, mesh, "scan")
        (part,) = llm.runner.parts
        assert (part.period, part.repeats) == (2, llm.config.num_hidden_layers // 2)
        assert part == segments(llm.config, "scan")[0]
        assert tokens == wanted
        np.testing.assert_allclose(found, logits, atol=1e-4)

"""Layers that repeat in periods of several, and layers by themselves: the same model whichever way they lie."""

from __future__ import annotations

import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.parallel.stages import layer_segments

from ..agreement import answers, assert_same_answers
from ..conftest import XLA, mesh_of

pytestmark = pytest.mark.usefixtures("few_block_sizes")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2, 7, 1]]
ALTERNATING = {
    "qwen3_moe_sparse_step": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": ()},
    "qwen2_layer_types": {"num_hidden_layers": 4, "layer_types": ("full_attention", "sliding_attention") * 2},
}


@pytest.fixture(
    params=[
        "qwen3_moe_sparse_step",
        pytest.param("qwen2_layer_types", marks=pytest.mark.sweep),
    ]  # the other on stages, too
)
def directory(request, changed_dir):
    return changed_dir(request.param, **ALTERNATING[request.param])


def results(directory, mesh: str, kernels):
    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="float32", kernels=kernels)
    return llm, answers(llm, PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))


def test_a_period_of_two_layers_means_what_layers_by_themselves_do(directory):
    by_itself, wanted = results(directory, "data=1", {"layers": "unroll"})
    assert len(by_itself._runner.segments) == by_itself.config.num_hidden_layers
    for mesh, kernels in (("data=1", XLA), ("tensor=2,expert=2", {"layers": "scan"})):
        llm, found = results(directory, mesh, kernels)
        (segment,) = llm._runner.segments
        assert (segment.period, segment.repeats) == (2, llm.config.num_hidden_layers // 2)
        assert segment == layer_segments(llm.config, "scan")[0]
        assert_same_answers(found, wanted)

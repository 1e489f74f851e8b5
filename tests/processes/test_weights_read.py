"""A process reads the bytes of its own parts of the weights, and no others."""

from __future__ import annotations

import pytest

from .groups import results_of_each

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "vocab_size": 2048}


SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    "mesh", ["tensor=4", *(pytest.param(mesh, marks=SWEEP) for mesh in ("pipeline=2,tensor=2", "data=2,tensor=2"))]
)
def test_a_process_reads_only_its_own_slices(mesh, changed_dir):
    model = str(changed_dir("llama_mha", num_attention_heads=8, num_key_value_heads=8, **WIDE))
    run = {"model": model, "options": {"mesh": mesh}, "only_load": True, "everywhere": True}
    for (result,) in results_of_each(2, 2, [run]):
        assert result["read"] <= 1.05 * result["own"], mesh
        assert result["read"] >= 0.9 * result["own"]

"""Every family against transformers' results on the very same file: one device, and meshes of 8 emulated devices."""

from __future__ import annotations

import pytest

from jaxmoe.model.kernels import KernelConfig

from ..agreement import assert_agrees
from ..aot.programs import assert_steps_hold_what_is_planned
from ..conftest import MESHES_OF_8, ONE_DEVICE, XLA
from ..tiny.cases import CASES, CASES_BY_NAME, QUICK_CASES
from ..tiny.checkpoint import checkpoint_sha256
from ..tiny.golden import load_golden

NAMES = [case.name for case in CASES]
QUICK = [case.name for case in QUICK_CASES]
MIXED_MESHES = ("data=2,tensor=2,expert=2", "tensor=8", "tensor=2,expert=4")


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_is_the_one_the_golden_was_taken_from(name, tiny_dir):
    assert checkpoint_sha256(tiny_dir(name)) == load_golden(CASES_BY_NAME[name]).checkpoint_sha256


# The quick cases run on a mesh below, and on one device for `make oracle` and the sweep.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep if name in QUICK else ()) for name in NAMES]
)
def test_one_device(name, tiny_llm):
    assert_agrees(tiny_llm(name, ONE_DEVICE), CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))


# Every family on a mesh that mixes the axes, and every second other mesh with one family; all with all in the sweep.
# A case for each mechanism runs once more with XLA's own optimizations.
# The program that scores whole prompts runs on one device for all, on meshes for these; for all in the sweep.
SCORED = {"qwen2_moe_shared", "deepseek_v3_groups", "gpt_oss_window"}
OPTIMIZED = {"llama_llama3", "qwen2_moe_shared", "deepseek_v3_groups", "gpt_oss_window", "llama4_text_scout"}
IN_TURN = [
    pytest.param(name, mesh, marks=[pytest.mark.optimized] if mesh == MIXED_MESHES[0] and name in OPTIMIZED else [])
    for family, name in enumerate(QUICK)
    for number, mesh in enumerate(MESHES_OF_8)
    if mesh == MIXED_MESHES[0] or (number % 2 == 0 and family == (5 * number + 3) % len(QUICK))
]


@pytest.mark.parametrize(("name", "mesh"), IN_TURN)
def test_a_case_of_every_family_on_meshes_in_turn(name, mesh, tiny_llm):
    llm = tiny_llm(name, mesh)
    assert_agrees(llm, CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]), scored=name in SCORED)
    assert_steps_hold_what_is_planned(llm, prefill=False)


OTHERS = [index for index, name in enumerate(NAMES) if name not in QUICK]


@pytest.mark.parametrize(
    "index", [pytest.param(index, marks=pytest.mark.sweep if at % 8 else ()) for at, index in enumerate(OTHERS)]
)
def test_other_cases_on_a_mesh_in_turn(index, tiny_llm):
    case = CASES[index]
    llm = tiny_llm(case.name, MIXED_MESHES[index % len(MIXED_MESHES)], XLA)
    assert_agrees(llm, case, load_golden(case), scored=False)


@pytest.mark.sweep
@pytest.mark.parametrize("kernels", [None, XLA])
@pytest.mark.parametrize("mesh", MESHES_OF_8)
@pytest.mark.parametrize("name", NAMES)
def test_every_case_on_every_mesh(name, mesh, kernels, tiny_llm):
    assert_agrees(tiny_llm(name, mesh, kernels), CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("mixtral_six_experts", KernelConfig(dispatch="all_gather")),
        ("qwen2_moe_shared", KernelConfig(grouped="ragged")),
        pytest.param("qwen2_moe_shared", KernelConfig(dispatch="all_gather"), marks=pytest.mark.sweep),
        pytest.param("mixtral_six_experts", KernelConfig(grouped="ragged"), marks=pytest.mark.sweep),
    ],
)
def test_other_kernels_mean_the_same(name, kernels, tiny_llm):
    llm = tiny_llm(name, "data=2,tensor=2,expert=2", kernels)
    assert_agrees(llm, CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))

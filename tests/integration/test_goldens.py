"""Every family against transformers' results on the very same file: one device, and meshes of 8 emulated devices."""

from __future__ import annotations

import pytest

from jaxmoe.model.kernels import Kernels

from ..agreement import assert_agrees
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


@pytest.mark.parametrize("name", NAMES)
def test_one_device(name, tiny_llm):
    assert_agrees(tiny_llm(name, ONE_DEVICE), CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))


# Every family on a mesh that mixes the axes, and on one or two of the others in turn; on all in the sweep.
IN_TURN = [
    pytest.param(name, mesh, marks=[pytest.mark.optimised] if mesh == MIXED_MESHES[0] else [])
    for family, name in enumerate(QUICK)
    for number, mesh in enumerate(MESHES_OF_8)
    if mesh == MIXED_MESHES[0] or (family + number) % 7 == 0
]


@pytest.mark.parametrize(("name", "mesh"), IN_TURN)
def test_a_case_of_every_family_on_meshes_in_turn(name, mesh, tiny_llm):
    assert_agrees(tiny_llm(name, mesh), CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))


@pytest.mark.parametrize("index", [index for index, name in enumerate(NAMES) if name not in QUICK][::2])
def test_every_second_of_the_other_cases_on_a_mesh_in_turn(index, tiny_llm):
    case = CASES[index]
    assert_agrees(tiny_llm(case.name, MIXED_MESHES[index % len(MIXED_MESHES)], XLA), case, load_golden(case))


@pytest.mark.sweep
@pytest.mark.parametrize("kernels", [None, XLA])
@pytest.mark.parametrize("mesh", MESHES_OF_8)
@pytest.mark.parametrize("name", NAMES)
def test_every_case_on_every_mesh(name, mesh, kernels, tiny_llm):
    assert_agrees(tiny_llm(name, mesh, kernels), CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))


@pytest.mark.parametrize("kernels", [Kernels(dispatch="all_gather"), Kernels(grouped="ragged")])
@pytest.mark.parametrize("name", ["mixtral_six_experts", "qwen2_moe_shared"])
def test_other_kernels_mean_the_same(name, kernels, tiny_llm):
    llm = tiny_llm(name, "data=2,tensor=2,expert=2", kernels)
    assert_agrees(llm, CASES_BY_NAME[name], load_golden(CASES_BY_NAME[name]))

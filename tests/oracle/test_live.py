"""Every case on one device and a mesh of 8, against transformers run here and now on the same file; that the goldens
are what transformers says makes tests of those, on every mesh, tests of this too."""

from __future__ import annotations

from functools import cache

import pytest

from ..agreement import assert_agrees
from ..conftest import ONE_DEVICE
from ..tiny.cases import CASES_BY_NAME
from ..tiny.golden import Reference, load_golden

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


@cache
def live(name: str, directory) -> Reference:
    from ..tiny.oracle import reference

    return reference(CASES_BY_NAME[name], directory)


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_the_golden_is_what_transformers_says(name, tiny_dir):
    now, golden = live(name, tiny_dir(name)), load_golden(CASES_BY_NAME[name])
    assert abs(now.last_logits - golden.last_logits).max() <= 1e-4
    assert now.greedy.tolist() == golden.greedy.tolist()


@pytest.mark.parametrize("mesh", [ONE_DEVICE, "data=2,tensor=2,expert=2"])
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_agrees_with_transformers(name, mesh, tiny_dir, tiny_llm):
    assert_agrees(tiny_llm(name, mesh), CASES_BY_NAME[name], live(name, tiny_dir(name)))

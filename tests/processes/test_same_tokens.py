"""A model over several processes gives what it gives in one: tokens, logits, collectives as planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .groups import results_of

SWEEP = pytest.mark.sweep
ENGINE = {"max_num_seqs": 4, "context": 64, "kv_cache_gib": 0.001, "chunk_tokens": 32}
SMALL = ENGINE | {"kv_cache_gib": 0.0005, "host_cache_gib": 0.001}  # pages go to host memory and back


def run(case: str, mesh: str, *, engine: dict[str, Any] | None = None, moves: bool = False, **options: Any):
    return {"model": case, "options": {"mesh": mesh, **options}, "engine": engine, "moves": moves}


DENSE, MOE, MLA, GPT_OSS = "llama_llama3", "qwen3_moe_norm", "deepseek_v3_groups", "gpt_oss_window"
RUNS = {
    "2x4": [
        run(MOE, "data=2,tensor=2,expert=2", engine=ENGINE, moves=True, redundant_experts=2),
        run(DENSE, "pipeline=2,tensor=4"),
    ],
    "4x2": [run(MLA, "pipeline=2,expert=2,tensor=2", layout="tp-ep", engine=SMALL)],
    "8x1": [run(GPT_OSS, "data=2,pipeline=2,expert=2", layout="dp-ep", kv_dtype="int8") | {"short": True}],
}
LAYOUTS = {
    "ep-tp": "data=2,expert=2,tensor=2", "tp-ep": "expert=4,tensor=2", "dp-ep": "data=2,expert=2,tensor=2",
    "tp": "expert=2,tensor=4", "ep-tp-sp": "expert=2,tensor=4", "cp-ep-tp": "data=2,expert=2,tensor=2",
}  # fmt: skip
SWEPT = [
    *(run(MOE, mesh, layout=layout) for layout, mesh in LAYOUTS.items()),
    *(run(case, "data=2,expert=2,tensor=2", engine=SMALL) for case in (DENSE, MLA, GPT_OSS)),
    *(run(case, "pipeline=2,expert=2,tensor=2", engine=ENGINE) for case in (MOE, MLA, GPT_OSS)),
    run("demo", "pipeline=4,tensor=2"),
    run(MOE, "data=2,expert=2,tensor=2", engine=SMALL, moves=True, redundant_experts=2, kv_dtype="int8"),
]


def located(runs: list[dict[str, Any]], tiny_dir) -> list[dict[str, Any]]:
    here = {"demo": "demo"}  # has as many layers as four stages need
    return [one | {"model": here.get(one["model"]) or str(tiny_dir(one["model"]))} for one in runs]


def compare(runs: list[dict[str, Any]], alone: list[dict[str, Any]], num_processes: int, tiny_dir) -> None:
    together = results_of(num_processes, 8 // num_processes, located(runs, tiny_dir))
    for one, wanted, found in zip(runs, alone, together, strict=True):
        label = str((one["model"], one["options"], num_processes))
        for key in wanted.keys() - {"logits", "scores"}:
            assert found[key] == wanted[key], (key, label)
        assert found["as_planned"], label
        np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-4, err_msg=label)
        for scores, wanted_scores in zip(found["scores"], wanted["scores"], strict=True):
            np.testing.assert_allclose(scores, wanted_scores, atol=1e-4, err_msg=label)


@pytest.mark.parametrize("split", RUNS)
def test_the_same_tokens_as_in_one_process(split, tiny_dir):
    alone = results_of(1, 8, located(RUNS[split], tiny_dir))
    compare(RUNS[split], alone, int(split[0]), tiny_dir)


@pytest.fixture(scope="module")
def swept_alone(tiny_dir) -> list[dict[str, Any]]:
    return results_of(1, 8, located(SWEPT, tiny_dir))


@SWEEP
@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_every_layout_and_family(num_processes, swept_alone, tiny_dir):
    compare(SWEPT, swept_alone, num_processes, tiny_dir)

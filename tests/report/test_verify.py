"""What verify compares: every mesh in every layout, those alike once; and every family on all of them, in the sweep."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.aot.compile import step_bucket
from jaxmoe.aot.request import InspectRequest
from jaxmoe.errors import ConfigError
from jaxmoe.families import read_config
from jaxmoe.model import moe, project
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, LAYOUTS
from jaxmoe.parallel.mesh import PlannedMesh, build_mesh, check_axes
from jaxmoe.parallel.sharding import MeshPlacement, PipelineView
from jaxmoe.parallel.stages import layer_segments
from jaxmoe.report.verify import ParityCase, all_meshes, all_trials, verify_trials

from ..tiny.cases import CASES_BY_NAME, QUICK_CASES

FIRST = "ep-tp", "tp-ep", "dp-ep", "tp"


def test_all_meshes_are_every_factorisation():
    meshes = all_meshes(8)
    assert len(meshes) == len({tuple(mesh.values()) for mesh in meshes}) == 20
    assert all(math.prod(mesh.values()) == 8 for mesh in meshes)
    assert all_meshes(1) == [{"data": 1, "pipeline": 1, "tensor": 1, "expert": 1}]


@pytest.mark.parametrize("moe", [True, False])
def test_every_mesh_is_tried_in_every_layout_or_one_that_is_alike(moe):
    trials = all_trials(all_meshes(8), moe=moe)
    tried = [(*trial.mesh.values(), layout) for trial in trials for layout in (trial.layout, *trial.also)]
    assert len(tried) == len(set(tried)) == 20 * len(LAYOUTS)
    placed = {(*trial.mesh.values(), trial.layout.used(trial.mesh, moe=moe)) for trial in trials}
    assert len(trials) == len(placed)
    assert len(all_trials(all_meshes(8), [LAYOUTS[name] for name in FIRST], moe=moe)) == (50 if moe else 40)


def _lies(mesh, layout) -> list:
    """Which part of every dim each device has, however layers stand to the pipeline."""
    placement = MeshPlacement(mesh=mesh, layout=layout)
    found: list = [
        placement.ep_exchange_axes("sequence_sharded"),
        placement.ep_replicated_axes("sequence_sharded"),
        placement.ep_gather_axes("sequence_sharded"),
    ]
    found = [[axis for axis in axes if mesh.shape[axis] > 1] for axes in found]
    for view, dim in itertools.product(get_args(PipelineView), layout.table):
        found.append(placement.with_view(view).sharding(dim).devices_indices_map((64,)))
    return found


@pytest.mark.parametrize("axes", all_meshes(8), ids=lambda axes: "x".join(map(str, axes.values())))
def test_layouts_are_alike_where_every_device_has_the_same_part_of_every_dim(axes):
    mesh = build_mesh(axes)
    for first, second in itertools.combinations(LAYOUTS.values(), 2):
        alike = first.used(axes, moe=True) == second.used(axes, moe=True)
        assert alike == (_lies(mesh, first) == _lies(mesh, second))


def test_layouts_of_experts_are_alike_to_a_model_without():
    mesh = {"tensor": 4, "expert": 2}
    assert LAYOUTS["ep-tp"].used(mesh, moe=False) == LAYOUTS["tp-ep"].used(mesh, moe=False)
    assert LAYOUTS["ep-tp"].used(mesh, moe=True) != LAYOUTS["tp-ep"].used(mesh, moe=True)
    assert LAYOUTS["ep-tp"].used(mesh, moe=False) != LAYOUTS["tp"].used(mesh, moe=False)


def test_a_trial_alone_is_of_the_default_layout(tiny_dir):
    (check,) = verify_trials(tiny_dir("mixtral_window"), trials=[ParityCase(mesh={"tensor": 2})], max_tokens=2)
    assert check.passed
    assert check.trial.layout == DEFAULT_LAYOUT
    assert not replace(check, max_logit_error=2e-4).passed
    assert not replace(check, num_equal=check.num_tokens - 1).passed


SHARING = [name for name in LAYOUTS if name.endswith("-sp")]
CONTEXT_SHARING = "batch=expert,context=data,split=tensor,sequence=tensor,experts=expert,expert_width=tensor"
ODD = [({"tensor": 3}, "tp-sp"), ({"pipeline": 3, "tensor": 2}, "tp-sp"), ({"data": 3, "tensor": 2}, CONTEXT_SHARING)]


@pytest.mark.parametrize(
    ("layout", "axes"),
    [(layout, axes) for layout in SHARING for axes in all_meshes(8)]
    + [(layout, check_axes(axes)) for axes, layout in ODD],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.values())),
)
def test_prompts_of_any_few_requests_are_shared_out_where_a_layout_says_so(layout, axes):
    config = read_config(CASES_BY_NAME["mixtral_six_experts"].config | {"num_hidden_layers": 8})
    mesh = ",".join(f"{axis}={size}" for axis, size in axes.items())
    asked = InspectRequest.of(model="", mesh=mesh, layout=layout, max_num_seqs=3, context=64)
    for platform in ("cpu", "gpu", "tpu"):
        runner = asked.runner(config, PlannedMesh(axes, platform), KernelConfig())
        placement = runner.placement
        if not placement.sequence_gather_axes("sequence_sharded"):  # the layout's axis is of one device
            continue
        for chunk in (1, 7, 24, 31, 128):
            bucket = step_bucket(runner, "prefill", **(asked.sizes | {"chunk_tokens": chunk}))
            tokens = bucket.num_tokens // bucket.micro_batches
            assert placement.token_dim(tokens * runner.num_ranks) == "sequence_sharded"
            assert tokens * runner.num_ranks % (placement.strip_rows * placement.num_shards("sequence_sharded")) == 0
            assert bucket.num_tokens <= 2 * (
                bucket.seq_slots + placement.num_stages * max(chunk, 2 * placement.strip_tokens)
            )


def test_tokens_that_are_shared_out_wrongly_are_found(tiny_dir, monkeypatch):
    """The gather before split regions gives what it should not: a comparison in which no token is shared out passes."""
    for module in (project, moe):
        monkeypatch.setattr(
            module,
            "all_gather_rows",
            lambda x, axes: jnp.tile(x, (jax.lax.axis_size(axes[0]), 1, 1)[: x.ndim]) if axes else x,
        )
    (check,) = verify_trials(
        tiny_dir("mixtral_window"), trials=[ParityCase(mesh={"tensor": 2}, layout=LAYOUTS["tp-sp"])], max_tokens=2
    )
    assert not check.passed


def _trials(case, layout: str) -> list[ParityCase]:
    moe = any(read_config(case.config).moe_layers)
    return [trial for trial in all_trials(all_meshes(8), moe=moe) if str(trial.layout) == layout]


def _deep(case) -> dict:
    """Keys of the fewest layers that eight stages can share out."""
    for layers in range(8, 65):
        keys: dict = {"num_hidden_layers": layers}
        if types := case.config.get("layer_types"):
            keys["layer_types"] = [types[at % len(types)] for at in range(layers)]
        try:
            layer_segments(read_config(case.config | keys), "scan", stages=8)
        except ConfigError:
            continue
        return {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    raise AssertionError(f"{case.name} repeats no layers")


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{case.name}-{layout}")
        for case in QUICK_CASES
        for layout in LAYOUTS
        if _trials(case, layout)  # without experts tp-ep is ep-tp everywhere
    ],
)
def test_every_family_on_every_mesh_in_every_layout(case, layout, changed_dir, record_property):
    trials = _trials(case, layout)
    directory = changed_dir(case.name, **_deep(case))
    checks = list(verify_trials(directory, trials=trials, max_tokens=8))
    assert [check.trial for check in checks] == trials
    record_property("placements", len(checks))  # with --junitxml: what docs/verify.md tells
    record_property("num_tokens", sum(check.num_tokens for check in checks))
    record_property("max_logit_error", max(check.max_logit_error for check in checks))
    assert [check for check in checks if not check.passed] == []

"""Stages of a pipeline: what one device gives, whatever they hold and however tokens are cut, and no other traffic."""

from __future__ import annotations

import asyncio
from fractions import Fraction

import numpy as np
import pytest

from jaxmoe import LLM, AsyncEngine, SamplingParams
from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.engine.batch import bucket_with
from jaxmoe.errors import MeshError
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.ops.native import find_compiler
from jaxmoe.parallel.collectives import CollectiveOp
from jaxmoe.parallel.stages import PipelineSchedule
from jaxmoe.train.recipe import TrainingRecipe
from jaxmoe.train.step import Trainer
from scripts.bench_pipeline import count_steady_ticks, count_ticks

from ..agreement import answers, assert_same_answers
from ..aot.programs import assert_nothing_is_copied, assert_steps_hold_what_is_planned, step_program
from ..conftest import NATIVE, XLA, mesh_of
from ..engine.test_engine import all_together, requests_of, twice_with_pages_that_come_back

pytestmark = pytest.mark.usefixtures("few_block_sizes")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3] * 3, [2, 7, 1], [5] * 9, [8, 2, 8], [1, 8]]
DEEP = "qwen3_moe_norm", {"num_hidden_layers": 9}
AROUND = "qwen2_moe_mlp_only", {"num_hidden_layers": 7, "mlp_only_layers": (0, 5)}  # layers before and after stages
PERIODIC = "qwen2_layer_types", {
    "num_hidden_layers": 6, "layer_types": ("full_attention", "sliding_attention") * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_device(changed_dir):
    """A model and what one device gives."""
    found = {}

    def results(model):
        name, keys = model
        if name not in found:
            llm = LLM.load(changed_dir(name, **keys), mesh=mesh_of("data=1"), dtype="float32")
            found[name] = outcome(llm)
        return found[name]

    return results


def outcome(llm):
    params = [SamplingParams(max_tokens=6 + i, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(5)]
    return answers(llm, PROMPTS, params)


def loaded(changed_dir, model, mesh, **options) -> LLM:
    name, keys = model
    return LLM.load(changed_dir(name, **keys), mesh=mesh_of(mesh), dtype="float32", **options)


@pytest.mark.parametrize(
    ("model", "mesh", "options"),
    [
        (DEEP, "pipeline=8", {}),
        (DEEP, "data=2,pipeline=2,expert=2", {"kernels": XLA}),
        pytest.param(
            DEEP,
            "pipeline=2,tensor=2,expert=2",
            {"kernels": KernelConfig(dispatch="all_gather", layers="unroll")},
            marks=pytest.mark.sweep,
        ),
        (DEEP, "pipeline=4,tensor=2", {"virtual_stages": 2}),
        (DEEP, "pipeline=3", {"virtual_stages": 3}),
        (AROUND, "pipeline=2,tensor=4", {}),
        pytest.param(AROUND, "pipeline=4,expert=2", {"kernels": XLA}, marks=pytest.mark.sweep),
        (PERIODIC, "pipeline=3,tensor=2", {}),
    ],
)
def test_stages_give_what_one_device_gives(model, mesh, options, changed_dir, one_device):
    llm = loaded(changed_dir, model, mesh, **options)
    assert any(segment.stages == llm.mesh.shape["pipeline"] for segment in llm._runner.segments)
    assert_same_answers(outcome(llm), one_device(model))
    assert_steps_hold_what_is_planned(llm)


def test_scores_of_stages_are_those_of_one_device(changed_dir):
    """The program that scores whole prompts, in micro-batches."""
    one, llm = (loaded(changed_dir, AROUND, mesh, kernels=XLA) for mesh in ("data=1", "data=2,pipeline=2,tensor=2"))
    np.testing.assert_allclose(llm.last_logits(PROMPTS), one.last_logits(PROMPTS), atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "without"),
    [
        pytest.param("pipeline=2,tensor=2,expert=2", "tensor=2,expert=2", marks=pytest.mark.sweep),
        ("pipeline=4", "data=1"),
    ],
)
def test_stages_change_no_bit_in_bfloat16(mesh, without, changed_dir):
    if find_compiler() is None:  # then no such promise is made
        return
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    results = []
    for each in (mesh, without):
        llm = LLM.load(changed_dir(DEEP[0], **DEEP[1]), mesh=mesh_of(each), dtype="bfloat16", kernels=NATIVE)
        results.append(([out.token_ids for out in llm.generate(PROMPTS, params)], llm.last_logits(PROMPTS)))
    (tokens, logits), (wanted_tokens, wanted_logits) = results
    assert tokens == wanted_tokens
    np.testing.assert_array_equal(logits, wanted_logits)


@pytest.mark.parametrize(
    ("model", "mesh", "kernels"),
    [
        pytest.param(DEEP, "pipeline=2,tensor=2", XLA, marks=pytest.mark.sweep),
        pytest.param(AROUND, "data=2,pipeline=2", NATIVE, marks=pytest.mark.sweep),
        pytest.param(AROUND, "data=2,pipeline=2", XLA, marks=pytest.mark.sweep),
    ],
)
def test_stages_run_in_bfloat16(model, mesh, kernels, changed_dir, one_device):
    """Layers beside the stages, which are split over them, too."""
    if kernels == NATIVE and find_compiler() is None:
        kernels = XLA
    directory = changed_dir(model[0], **model[1])
    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="bfloat16", kernels=kernels)
    (tokens, logprobs), (wanted, exact) = outcome(llm), one_device(model)
    firsts = [at for at in range(len(PROMPTS)) if tokens[at][0] == wanted[at][0]]
    assert len(firsts) >= 3
    assert max(abs(logprobs[at][0] - exact[at][0]) for at in firsts) < 0.2


STEPS = [
    (DEEP, "pipeline=2,tensor=2,expert=2", {"kernels": XLA}),
    (DEEP, "pipeline=2,tensor=2,expert=2", {"kernels": NATIVE}),
    (DEEP, "data=2,pipeline=4", {"kernels": XLA, "virtual_stages": 2}),
    (AROUND, "pipeline=4,tensor=2", {"kernels": XLA}),
]


@pytest.mark.parametrize(
    ("model", "mesh", "options", "blocks"),
    [
        pytest.param(*step, blocks, marks=() if (at, blocks) in {(2, 4), (3, 0)} else pytest.mark.sweep)
        for at, step in enumerate(STEPS)
        for blocks in (0, 4)
    ],
)
def test_a_step_holds_exactly_the_planned_collectives(model, mesh, options, blocks, changed_dir):
    llm = loaded(changed_dir, model, mesh, **options)
    stages = llm.mesh.shape["pipeline"]
    bucket = bucket_with(2 * stages, blocks, block_tokens=8, pages=3, stages=stages)
    assert collectives(step_program(llm, bucket).as_text(), llm.mesh) == llm._runner.traffic.planned(bucket)


@pytest.mark.parametrize(
    ("model", "mesh", "layout"),
    [
        pytest.param(DEEP, "pipeline=2,tensor=2,expert=2", "ep-tp", marks=pytest.mark.sweep),
        (AROUND, "pipeline=4,tensor=2", "tp-ep-sp"),
        (DEEP, "data=2,pipeline=2,tensor=2", "cp-ep-tp"),
    ],
)
def test_a_tick_of_decoding_stages_holds_exactly_the_planned_collectives(model, mesh, layout, changed_dir):
    """Of the loop over several decode steps: an iteration is a tick, and there are as many as the schedule says."""
    llm = loaded(changed_dir, model, mesh, kernels=XLA, layout=layout)
    stages, shares = llm.mesh.shape["pipeline"], llm._runner.context_ranks
    bucket = bucket_with(4 * stages * shares, 0, block_tokens=8, pages=3, stages=stages, shares=shares)
    found = collectives(step_program(llm, bucket, decode_steps=3).as_text(), llm.mesh)
    assert found == llm._runner.traffic.planned_decode_step(bucket)
    assert llm._runner.traffic.iterations(bucket, 3) == 3 * stages + stages - 1


def test_two_stages_send_each_token_on_once(changed_dir):
    """(P - 1) B S h b bytes in all: nothing is sent by a stage that has nothing."""
    llm = loaded(changed_dir, DEEP, "pipeline=2,tensor=2", kernels=XLA)
    bucket = bucket_with(4, 0, block_tokens=8, pages=3, stages=2)
    hidden = llm.config.hidden_size * 4
    sent = CollectiveOp(op="collective-permute", axes=("pipeline",), result_bytes=bucket.num_tokens // 2 * hidden)
    assert llm._runner.traffic.planned(bucket)[sent] == bucket.micro_batches == 2
    assert sum(len(PipelineSchedule(stages=2, micro_batches=2).sends(tick)) for tick in range(3)) == 2


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual_stages"), [(2, 1, 1), (2, 5, 2), (4, 4, 2), (4, 9, 1), (8, 3, 1)]
)
def test_stages_are_idle_as_often_as_the_formula_says(stages, micro_batches, virtual_stages):
    """Counted by the stages themselves, on the devices."""
    found = count_ticks(stages, micro_batches, virtual_stages)
    assert found.busy == stages * virtual_stages * micro_batches
    assert found.idle == pytest.approx((stages - 1) / (virtual_stages * micro_batches + stages - 1), abs=1e-12)


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_every_schedule_is_idle_as_the_formula_says_or_as_little_as_can_be(stages, virtual_stages):
    """Units counted one by one. With fewer micro-batches than stages and several virtual stages the last micro-batch
    enters in tick M - 1 and is in no two virtual stages at once: stages x virtual stages ticks more are the least there
    can be."""
    for micro_batches in range(1, 17):
        schedule = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
        ticks = schedule.ticks()
        busy = sum(schedule.slot(tick, stage).valid for tick in range(ticks) for stage in range(stages))
        assert busy == stages * virtual_stages * micro_batches
        if micro_batches >= stages or virtual_stages == 1:
            formula = Fraction(stages - 1, virtual_stages * micro_batches + stages - 1)
            assert 1 - Fraction(busy, stages * ticks) == schedule.idle() == formula
        else:
            assert ticks == micro_batches - 1 + stages * virtual_stages


@pytest.mark.parametrize(("stages", "micro_batches", "virtual_stages"), [(2, 2, 1), (4, 2, 1), (4, 5, 2)])
def test_decoding_stages_wait_only_while_the_pipeline_fills(stages, micro_batches, virtual_stages):
    found = count_steady_ticks(stages, micro_batches, virtual_stages, decode_steps=2)
    assert found.busy == 2 * stages * virtual_stages * micro_batches
    assert found.idle == found.formula == 1 - min(1, micro_batches / stages)


def test_no_weight_is_copied_and_pages_are_donated(changed_dir):
    llm = loaded(changed_dir, DEEP, "pipeline=4,tensor=2", kernels=XLA)
    bucket = bucket_with(8, 0, block_tokens=8, pages=3, stages=4)
    assert_nothing_is_copied(llm, step_program(llm, bucket))


@pytest.mark.sweep
def test_requests_that_come_and_go_give_what_each_gives_alone(changed_dir):
    """With penalties and drawn tokens."""
    llm = loaded(changed_dir, AROUND, "data=2,pipeline=2,tensor=2")
    requests = requests_of(16, llm.config.vocab_size)
    alone = [llm.generate([prompt], params)[0].token_ids for prompt, params in requests]
    together = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    assert [out.token_ids for out in together] == alone


def test_an_engine_keeps_pages_of_all_stages(changed_dir):
    llm = loaded(changed_dir, AROUND, "data=2,pipeline=2,tensor=2", kv_dtype="int8")
    requests = requests_of(24, llm.config.vocab_size)
    page_gib = llm._runner.device_bytes_per_token * 4 / 2**30
    sizes = dict(max_num_seqs=8, context=48, kv_cache_gib=24 * page_gib, page_size=4, chunk_tokens=16)

    found = twice_with_pages_that_come_back(llm, requests, **sizes)
    with AsyncEngine(llm, **sizes | {"kv_cache_gib": 400 * page_gib}) as engine:
        assert asyncio.run(all_together(engine, requests)) == found


def test_experts_are_counted_on_their_stages(changed_dir, tmp_path):
    llm = loaded(changed_dir, AROUND, "pipeline=2,expert=2")
    with llm.trace(tmp_path / "trace.json") as trace:
        llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
    computed = sum(len(prompt) for prompt in PROMPTS) + 2 * len(PROMPTS)
    for layer in range(sum(llm.config.moe_layers)):
        got = sum(step.expert_tokens[layer].sum() for step in trace.steps)
        assert got == computed * llm.config.moe.num_experts_per_tok


def test_training_says_that_it_has_no_stages(changed_dir):
    llm = loaded(changed_dir, DEEP, "data=1")
    recipe = TrainingRecipe.__new__(TrainingRecipe)
    object.__setattr__(recipe, "model", llm.config)
    from jaxmoe.parallel.sharding import MeshPlacement

    with pytest.raises(MeshError, match="pipeline=2: training runs pipeline=1 only"):
        Trainer(recipe, MeshPlacement(mesh=mesh_of("pipeline=2")))

"""Experts move between steps: the same tokens, nothing compiled, and the counters say where tokens went."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.errors import ConfigError
from jaxmoe.parallel.eplb import ExpertPlacement, balance

from ..agreement import answers, assert_same_answers
from ..conftest import mesh_of

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3] * 2, [2, 7, 1], [5] * 9, [8, 2, 8], [1, 8]]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@contextmanager
def programs_compiled():
    """The events of XLA's compiler inside the with-statement."""
    found: list[str] = []
    listen = lambda event, *_, **__: found.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def shuffled(experts, seed: int) -> ExpertPlacement:
    """Any placement: the experts and so many replicas as there is room for, anywhere."""
    rng = np.random.default_rng(seed)
    spare = experts.num_physical_experts - experts.num_experts
    rows = [
        [*range(experts.num_experts), *rng.integers(0, experts.num_experts, spare)] for _ in range(experts.num_layers)
    ]
    return placement_of([rng.permutation(row) for row in rows], experts)


def placement_of(physical_to_logical_map, experts) -> ExpertPlacement:
    """The placement with these experts at the places of each layer."""
    physical_to_logical_map = np.array(physical_to_logical_map)
    nth = [[int(np.sum(row[:place] == expert)) for place, expert in enumerate(row)] for row in physical_to_logical_map]
    count = [np.bincount(row, minlength=experts.num_experts) for row in physical_to_logical_map]
    return ExpertPlacement(
        physical_to_logical_map=physical_to_logical_map,
        replica_index=np.array(nth),
        logical_replica_count=np.array(count),
        num_ranks=experts.num_ranks,
    )


@pytest.mark.parametrize(
    ("name", "mesh", "layout", "redundant", "dispatch"),
    [
        ("mixtral_six_experts", "data=2,tensor=2,expert=2", "ep-tp", 2, "all_to_all"),
        pytest.param("qwen2_moe_shared", "tensor=2,expert=2", "tp-ep", 0, "ragged_all_to_all", marks=pytest.mark.sweep),
        pytest.param(
            "qwen3_moe_sparse_step",
            "pipeline=2,tensor=2,expert=2",
            "tp-ep-sp",
            5,
            "all_gather",
            marks=pytest.mark.sweep,
        ),
        (  # axes in an order of their own
            "mixtral_six_experts",
            "data=2,tensor=2,expert=2",
            "batch=data+expert+tensor,experts=tensor+expert+data",
            2,
            "hierarchical",
        ),
    ],
)
def test_moved_experts_give_the_same_and_nothing_is_compiled(name, mesh, layout, redundant, dispatch, changed_dir):
    directory = changed_dir(name, num_hidden_layers=4)
    one = LLM.load(directory, mesh=mesh_of("data=1"), dtype="float32")
    expected = answers(one, PROMPTS, PARAMS)
    llm = LLM.load(
        directory, mesh=mesh_of(mesh), layout=layout, dtype="float32", redundant_experts=redundant,
        kernels={"dispatch": dispatch},
    )  # fmt: skip
    for seed in range(3):
        with programs_compiled() as compiled:
            assert_same_answers(answers(llm, PROMPTS, PARAMS), expected)
        assert bool(compiled) == (seed == 0)
        wanted = shuffled(llm._runner.experts, seed)
        llm.place_experts(wanted)
        assert llm._runner.experts.placement is wanted
    if dispatch in ("all_to_all", "hierarchical"):  # the program that scores whole prompts reads where they stand, too
        np.testing.assert_allclose(llm.last_logits(PROMPTS), one.last_logits(PROMPTS), atol=1e-4)


@pytest.mark.parametrize("redundant", [None, 4])
def test_counters_add_up_to_every_token_and_every_expert_it_chose(redundant, tiny_dir):
    llm = LLM.load(
        tiny_dir("qwen3_moe_norm"), mesh=mesh_of("data=2,tensor=2,expert=2"), layout="tp-ep", dtype="float32",
        redundant_experts=redundant,
    )  # fmt: skip
    one = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh_of("data=1"), dtype="float32")
    found = llm.expert_loads(PROMPTS, PARAMS)
    loads = found.by_physical_expert
    experts = llm._runner.experts
    moe = llm.config.moe
    num_tokens = sum(len(prompt) for prompt in PROMPTS) + (PARAMS.max_tokens - 1) * len(PROMPTS)
    assert (found.by_expert.sum(axis=1) == num_tokens * moe.num_experts_per_tok).all()
    np.testing.assert_array_equal(found.by_expert, one.expert_loads(PROMPTS, PARAMS).by_expert)
    assert found.by_rank.shape == (experts.num_layers, 4)
    np.testing.assert_array_equal(found.by_rank, loads.reshape(experts.num_layers, 4, -1).sum(axis=2))
    if redundant:  # replicas of an expert share its tokens
        for layer, physical_to_logical_map in enumerate(experts.placement.physical_to_logical_map):
            for expert in np.flatnonzero(experts.placement.logical_replica_count[layer] > 1):
                shares = loads[layer][physical_to_logical_map == expert]
                assert (shares > 0).all() or shares.sum() < 10


def test_experts_placed_by_their_loads_fill_ranks_more_evenly(tiny_dir):
    """Twice as many tokens on some ranks as on others before, by the counters and not by the plan."""
    from jaxmoe.parallel.eplb import balancedness

    llm = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh_of("expert=4"), dtype="float32", redundant_experts=4)
    experts, rng = llm._runner.experts, np.random.default_rng(0)
    prompts = [rng.integers(0, llm.config.vocab_size, 40).tolist() for _ in range(24)]
    before = llm.expert_loads(prompts, PARAMS).by_expert
    popular = np.argsort(-before, axis=1)
    together = [[*order, *[order[-1]] * (experts.num_physical_experts - len(order))] for order in popular]
    llm.place_experts(placement_of(together, experts))
    uneven = balancedness(llm.expert_loads(prompts, PARAMS).by_rank)
    llm.place_experts(balance(before, num_replicas=experts.num_physical_experts, num_ranks=experts.num_ranks))
    even = balancedness(llm.expert_loads(prompts, PARAMS).by_rank)
    assert even > uneven + 0.2
    assert even > 0.85


def test_placements_that_do_not_fit_the_model_are_refused(tiny_dir):
    mesh = mesh_of("expert=4")
    llm = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh, dtype="float32", redundant_experts=0)
    experts = llm._runner.experts
    loads = np.ones((experts.num_layers, experts.num_experts))
    with pytest.raises(ConfigError, match="physical experts"):
        llm.place_experts(balance(loads, num_replicas=experts.num_physical_experts + 4, num_ranks=4))
    with pytest.raises(ConfigError, match="2 ranks, the model has"):
        llm.place_experts(balance(loads, num_replicas=experts.num_physical_experts, num_ranks=2))
    whole = balance(loads, num_replicas=experts.num_physical_experts, num_ranks=4)
    first, twice = np.zeros_like(whole.physical_to_logical_map), np.zeros_like(whole.replica_index)
    spread = np.tile(np.arange(whole.physical_to_logical_map.shape[1]), (len(first), 1))
    for wrong in (
        {"physical_to_logical_map": first}, {"physical_to_logical_map": first, "replica_index": spread},
        {"physical_to_logical_map": whole.physical_to_logical_map + 1},
        {"physical_to_logical_map": -whole.physical_to_logical_map},
        {"logical_replica_count": whole.logical_replica_count + 1}, {"replica_index": twice + 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="at least once in every layer"):
            llm.place_experts(replace(whole, **wrong))
    llm.place_experts(whole)
    in_order = LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh, dtype="float32")
    with pytest.raises(ConfigError, match="redundant_experts"):
        in_order.place_experts(whole)
    for wrong in (-1, 2.5, 10**6):
        with pytest.raises(ConfigError, match="redundant_experts"):
            LLM.load(tiny_dir("qwen3_moe_norm"), mesh=mesh, redundant_experts=wrong)
    with pytest.raises(ConfigError, match="no experts"):
        LLM.load(tiny_dir("llama_llama3"), mesh=mesh_of("tensor=2"), redundant_experts=2)

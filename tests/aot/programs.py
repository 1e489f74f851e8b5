"""Compiled steps of a model, and what must hold of any of them."""

from __future__ import annotations

import jax

from jaxmoe.aot.hlo_collectives import collectives
from jaxmoe.engine.batch import StepBucket

_PAGES, _PAGE_SIZE = 8, 16


def step_program(llm, bucket: StepBucket, *, decode_steps: int = 1):
    """The step of a bucket, compiled as for float32."""
    state = llm._runner.abstract_state(bucket.seq_slots, _PAGES, _PAGE_SIZE * llm._runner.context_ranks)
    with jax.default_matmul_precision("highest"):
        return llm._runner.lower(state, bucket, max_decode_steps=decode_steps).compile()


def assert_steps_hold_what_is_planned(llm, *, prefill: bool = True) -> None:
    """Compare the collectives of every program that `generate` ran with the plan, prefill (where asked for) and decode.

    Those of decode are in JAX's caches: nothing is compiled anew.
    """
    core, runner = llm._core, llm._runner
    assert any(bucket.blocks for bucket in core.buckets)
    assert any(not bucket.blocks for bucket in core.buckets)
    for bucket in core.buckets:
        if bucket.blocks and not prefill:
            continue
        decode_steps = 1 if bucket.blocks else core.scheduler_config.decode_steps
        with runner._precisely():
            program = runner.lower(core._worker.state, bucket, max_decode_steps=decode_steps).compile()
        planned = runner.traffic.planned_program(bucket, max_decode_steps=decode_steps)
        assert collectives(program.as_text(), llm.mesh) == planned


def assert_nothing_is_copied(llm, program) -> None:
    """Pages are donated, and a step needs less than half as much memory besides as its weights take."""
    memory = program.memory_analysis()
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in llm._runner.leaves)
    state = llm._runner.empty_state(1, _PAGES, _PAGE_SIZE * llm._runner.context_ranks)
    pages = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(state.pages))
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes < weights / 2

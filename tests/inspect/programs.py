"""Compiled steps of a model, and what must hold of any of them."""

from __future__ import annotations

import jax

from jaxmoe.engine.batch import Bucket

_PAGES, _PAGE_SIZE = 8, 16


def step_program(llm, bucket: Bucket, *, turns: int = 1):
    """The step of a bucket, compiled as for float32."""
    state = llm.runner.abstract_state(bucket.rows, _PAGES, _PAGE_SIZE * llm.runner.context_ranks)
    with jax.default_matmul_precision("highest"):
        return llm.runner.lower(state, bucket, turns=turns).compile()


def assert_nothing_is_copied(llm, program) -> None:
    """Pages are donated, and a step needs less than half as much memory besides as its weights take."""
    memory = program.memory_analysis()
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in llm.runner.leaves)
    state = llm.runner.empty_state(1, _PAGES, _PAGE_SIZE * llm.runner.context_ranks)
    pages = sum(part.addressable_shards[0].data.nbytes for part in jax.tree.leaves(state.pages))
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes < weights / 2

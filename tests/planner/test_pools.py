"""Pools for prefill and decode: whole steps, limits kept, as many requests as are said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from jaxmoe.planner.pools import beats, best_disaggregated
from jaxmoe.planner.search import servings_of
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.specs import candidates_of
from jaxmoe.planner.step_time import StepBatch

from .plans import found, question


def test_pools_share_out_what_they_serve():
    asked = question("llama-3.1-70b", "h100", 16)
    pools = best_disaggregated(asked, engine_devices=4)
    assert pools is not None
    assert pools.prefill_engines + pools.decode_engines == 4
    assert pools.tokens_per_s < 2 * found("llama-3.1-70b", "h100", 16).best.tokens_per_s
    assert pools.transfer > 0
    assert best_disaggregated(asked, engine_devices=16) is None


@pytest.mark.parametrize("isl", [1024, 5000])
def test_a_prompt_takes_whole_steps_of_the_engine_that_reads_it(isl):
    asked = replace(question("llama-3.1-8b", "h100", 8), workload=RequestWorkload(isl=isl, osl=1024))
    pools = best_disaggregated(asked, engine_devices=4)
    assert pools is not None
    engine = replace(asked, devices=4)
    serving = next(
        serving for alike, serving in servings_of(engine, candidates_of(engine))
        if replace(alike[-1], chunk_tokens=pools.prefill.chunk_tokens) == pools.prefill
    )  # fmt: skip
    chunk = pools.prefill.chunk_tokens
    step = serving.cost.step_time(StepBatch(0, chunk, 0, isl / 2)).total
    assert pools.ttft - pools.transfer == pytest.approx(step * math.ceil(isl / chunk))


def test_the_chunk_of_a_prefill_engine_keeps_the_limit_of_the_first_token():
    asked = question("llama-3.1-8b", "h100", 8)
    free = best_disaggregated(asked, engine_devices=1)
    assert free is not None
    tight = best_disaggregated(replace(asked, ttft_limit=0.6 * free.ttft), engine_devices=1)
    assert tight is not None
    assert tight.ttft <= 0.6 * free.ttft
    assert tight.prefill.chunk_tokens < free.prefill.chunk_tokens
    assert best_disaggregated(replace(asked, ttft_limit=1e-4), engine_devices=1) is None


def test_requests_at_once_bound_what_pools_serve():
    asked = question("llama-3.1-70b", "h100", 16)
    for count in (16, 64):
        pools = best_disaggregated(asked, engine_devices=8, concurrency=count)
        assert pools is not None
        assert pools.concurrency == count
        assert pools.tokens_per_s * pools.request_seconds == pytest.approx(count * pools.osl)
    assert pools.tokens_per_s < best_disaggregated(asked, engine_devices=8).tokens_per_s


@pytest.mark.parametrize("osl", [8, 1024])
def test_requests_on_their_way_to_the_first_token_are_counted(osl):
    """Little's law."""
    asked = replace(question("llama-3.1-70b", "h100", 16), workload=RequestWorkload(isl=8192, osl=osl))
    pools = best_disaggregated(asked, engine_devices=4)
    assert pools is not None
    assert pools.concurrency == math.ceil(pools.tokens_per_s / osl * pools.request_seconds)


def test_one_token_needs_no_pool_that_decodes():
    asked = replace(question("llama-3.1-70b", "h100", 16), workload=RequestWorkload(isl=8192, osl=1))
    assert best_disaggregated(asked, engine_devices=4) is None


def test_pools_of_as_many_requests_are_compared_with_the_plan():
    asked = replace(question("llama-3.1-405b", "h200", 64, "latency"))
    best = found("llama-3.1-405b", "h200", 64, "latency").best
    pools = best_disaggregated(asked, engine_devices=8, concurrency=best.estimate.concurrency)
    assert pools is not None
    assert pools.concurrency == best.estimate.concurrency
    assert beats(pools, best, asked) == (pools.request_seconds < 0.95 * best.request_seconds)
    assert pools.tokens_per_s == pytest.approx(pools.concurrency * pools.osl / pools.request_seconds)

"""Buckets are few and hold what they must; what is packed for a step reads back as it was planned."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.engine.batch import Bucket, all_buckets, bucket_of, pack, row_buckets
from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.scheduler import Limits, Scheduler, Sequence

LIMITS = Limits(num_ranks=2, rows=8, chunk_tokens=32, block_tokens=4, num_pages=40, page_size=4, context=40)


@pytest.mark.parametrize(
    ("least", "most", "sizes"), [(1, 1, [1]), (2, 2, [2]), (1, 4, [1, 4]), (2, 8, [2, 8]), (1, 64, [1, 4, 16, 64])]
)
def test_rows_come_in_few_sizes(least, most, sizes):
    assert row_buckets(least=least, most=most) == sizes


def test_every_plan_runs_in_a_bucket_that_was_listed():
    scheduler = Scheduler(LIMITS)
    listed = all_buckets(LIMITS, least_rows=1, pages=10)
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(40):
        length = int(rng.integers(1, 30))
        scheduler.add(Sequence(request_id=index, tokens=[1] * length, max_total=length + int(rng.integers(1, 9))))
    while plan := scheduler.plan():
        bucket = bucket_of(plan, LIMITS, least_rows=1, pages=10)
        assert bucket in listed
        seen.add(bucket)
        for sequence, _ in scheduler.complete(plan, [int(rng.integers(9)) for _ in plan.sampled()]):
            if len(sequence.tokens) >= sequence.max_total:
                scheduler.finish(sequence)
    assert seen == set(listed)


def test_what_is_packed_reads_back():
    scheduler = Scheduler(LIMITS)
    params = {0: SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=2**32 - 1), 1: SamplingParams()}
    for index, length in enumerate((6, 3)):
        scheduler.add(Sequence(request_id=index, tokens=list(range(1, length + 1)), max_total=12))
    plan = scheduler.plan()
    bucket = bucket_of(plan, LIMITS, least_rows=1, pages=10)
    packed, places = pack(plan, bucket, LIMITS, params.__getitem__)
    assert packed.shape == (2, bucket.length)
    parts = bucket.split(packed)
    assert [chunk.sequence.rank for chunk in plan.chunks] == [0, 1]  # the second goes where most is free
    first, second = (chunk.sequence for chunk in plan.chunks)
    np.testing.assert_array_equal(parts["block_tokens"][0, :2], [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(parts["block_positions"][0, :2], [0, 4])
    np.testing.assert_array_equal(parts["block_counts"][:, :2], [[4, 2], [3, 0]])
    np.testing.assert_array_equal(parts["block_slots"][:, :2], [[8, first.slot], [second.slot, 8]])
    assert places == [(0, bucket.rows + 1), (1, bucket.rows)]
    row = bucket.rows + 1
    assert parts["table"][0, row, :2].tolist() == first.pages
    assert parts["top_k"][0, row] == 7
    assert parts["seed"][0, row].view(np.uint32) == 2**32 - 1
    floats = [float(parts[name][0, row].view(np.float32)) for name in ("temperature", "top_p", "min_p")]
    assert floats == [0.5, 0.25, 0.125]

    scheduler.complete(plan, [50, 60])
    plan = scheduler.plan()
    bucket = bucket_of(plan, LIMITS, least_rows=1, pages=10)
    assert bucket == Bucket(rows=1, blocks=0, block_tokens=4, pages=10)
    parts = bucket.split(pack(plan, bucket, LIMITS, params.__getitem__)[0])
    np.testing.assert_array_equal(parts["row_positions"], [[6], [3]])
    np.testing.assert_array_equal(parts["row_counts"], [[1], [1]])

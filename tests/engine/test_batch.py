"""Buckets are few and hold what they must; what is packed for a step reads back as it was planned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxmoe.engine.batch import FLOAT_PARTS, RequestMetadata, StepBucket, all_buckets, bucket_of, pack, slot_buckets
from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.request import SamplingParams
from jaxmoe.engine.scheduler import ScheduledSequence, StepScheduler

SCHEDULER_CONFIG = SchedulerConfig(
    num_ranks=2, max_num_seqs=8, chunk_tokens=32, block_tokens=4, num_pages=40, page_size=4, context=40
)


@pytest.mark.parametrize(
    ("least", "most", "sizes"), [(1, 1, [1]), (2, 2, [2]), (1, 4, [1, 4]), (2, 8, [2, 8]), (1, 64, [1, 4, 16, 64])]
)
def test_rows_come_in_few_sizes(least, most, sizes):
    assert slot_buckets(least=least, most=most) == sizes


def test_every_plan_runs_in_a_bucket_that_was_listed():
    scheduler = StepScheduler(SCHEDULER_CONFIG)
    listed = all_buckets(SCHEDULER_CONFIG, min_seq_slots=1, pages=10)
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(40):
        length = int(rng.integers(1, 30))
        scheduler.add(
            ScheduledSequence(request_id=index, tokens=[1] * length, max_total=length + int(rng.integers(1, 9)))
        )
    while (plan := scheduler.plan()) or len(seen) < len(listed):
        if not plan:  # all have ended: one more by itself
            scheduler.add(ScheduledSequence(request_id=99, tokens=[1], max_total=3))
            continue
        bucket = bucket_of(plan, SCHEDULER_CONFIG, min_seq_slots=1, pages=10)
        assert bucket in listed
        seen.add(bucket)
        sampled_tokens = [rng.integers(9, size=count).tolist() for _, count in plan.sampled()]
        for sequence, _, _ in scheduler.complete(plan, sampled_tokens):
            if len(sequence.tokens) >= sequence.max_total:
                scheduler.finish(sequence)
    assert seen == set(listed)


def test_what_is_packed_reads_back():
    scheduler = StepScheduler(replace(SCHEDULER_CONFIG, decode_steps=3))
    drawing = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-2.0,
        frequency_penalty=0.75, logit_bias={3: -1.5, 9: 4.0}, min_tokens=2,
    )  # fmt: skip
    request_metadata = [
        RequestMetadata(params=drawing, num_prompt=6, ends=(0, 5), seed=-2),
        RequestMetadata(params=SamplingParams(), num_prompt=3, ends=(0,), seed=0),
    ]
    for index, length in enumerate((6, 3)):
        scheduler.add(ScheduledSequence(request_id=index, tokens=list(range(1, length + 1)), max_total=12))
    plan = scheduler.plan()
    bucket = bucket_of(plan, SCHEDULER_CONFIG, min_seq_slots=1, pages=10)
    packed = pack(plan, bucket, SCHEDULER_CONFIG, request_metadata.__getitem__)
    assert packed.shape == (2, bucket.length)
    parts = bucket.split(packed)
    assert [chunk.sequence.rank for chunk in plan.chunks] == [0, 1]  # the second goes where most is free
    first, second = (chunk.sequence for chunk in plan.chunks)
    np.testing.assert_array_equal(parts["block_tokens"][0, :2], [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(parts["block_positions"][0, :2], [0, 4])
    np.testing.assert_array_equal(parts["block_query_lens"][:, :2], [[4, 2], [3, 0]])
    assert parts["block_seq_slots"][0, :2].tolist() == [first.slot] * 2
    logits_indices = parts["logits_indices"]
    assert logits_indices[0, first.slot] == [bucket.seq_slots + 4 + 1]
    assert logits_indices[1, second.slot] == [bucket.seq_slots + 2]
    assert (np.delete(logits_indices[0], first.slot, axis=0) == -1).all()
    at = (0, first.slot)
    assert parts["block_table"][at][:2].tolist() == first.pages
    assert [parts[name][at].view(np.uint32) for name in ("seed", "seed_high")] == [2**32 - 2, 2**32 - 1]
    found = {name: parts[name][at].view(np.float32).tolist() for name in FLOAT_PARTS if name != "bias"}
    assert found == dict(temperature=0.5, top_p=0.25, min_p=0.125, repetition=1.5, presence=-2.0, frequency=0.75)
    assert parts["bias_token_ids"][at][:5].tolist() == [0, 5, 3, 9, np.iinfo(np.int32).max]
    assert parts["bias"][at][:4].view(np.float32).tolist() == [0, 0, -1.5, 4.0]
    whole = {name: int(parts[name][at]) for name in ("top_k", "prompt_length", "num_stop_ids", "min_tokens_until")}
    assert whole == dict(top_k=7, prompt_length=6, num_stop_ids=2, min_tokens_until=8)

    list(scheduler.complete(plan, [[50], [60]]))
    plan = scheduler.plan()
    bucket = bucket_of(plan, SCHEDULER_CONFIG, min_seq_slots=1, pages=10)
    assert bucket == StepBucket(seq_slots=1, blocks=0, block_tokens=4, pages=10)
    assert plan.decode_steps == 3
    parts = bucket.split(pack(plan, bucket, SCHEDULER_CONFIG, request_metadata.__getitem__))
    np.testing.assert_array_equal(parts["positions"], [[6], [3]])
    np.testing.assert_array_equal(parts["query_lens"], [[3], [3]])
    np.testing.assert_array_equal(parts["logits_indices"], [[[0]], [[0]]])

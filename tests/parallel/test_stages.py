"""Alike layers are found and stacked; every layer has one place."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig, MoEConfig, RopeConfig
from jaxmoe.errors import ConfigError
from jaxmoe.parallel.stages import LayerSegment, PipelineSchedule, layer_segments, locate_layer


def config(moe_layers: tuple[bool, ...], windows: tuple[int | None, ...] | None = None) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=len(moe_layers),
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=8, rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4), moe_layers=moe_layers, sliding_windows=windows or (None,) * len(moe_layers),
        moe=MoEConfig(num_experts=2, num_experts_per_tok=1, intermediate_size=8, norm_topk_prob=True),
    )  # fmt: skip


def shapes(found: tuple[LayerSegment, ...]) -> list[tuple[int, int, int]]:
    return [(segment.first, segment.period, segment.repeats) for segment in found]


@pytest.mark.parametrize(
    ("moe_layers", "windows", "expected"),
    [
        ((True,) * 6, None, [(0, 1, 6)]),
        ((False,) * 3 + (True,) * 5, None, [(0, 1, 3), (3, 1, 5)]),
        ((False, True) * 4, None, [(0, 2, 4)]),
        ((True,) * 6, (4, None) * 3, [(0, 2, 3)]),
        ((False, *(True,) * 7), (None, 4, 4, 4, None, 4, 4, 4), [(0, 1, 1), (1, 1, 3), (4, 1, 1), (5, 1, 3)]),
        ((True,), None, [(0, 1, 1)]),
    ],
)
def test_segments_are_as_long_as_layers_repeat(moe_layers, windows, expected):
    assert shapes(layer_segments(config(moe_layers, windows), "scan")) == expected


@given(
    layers=st.lists(st.tuples(st.booleans(), st.sampled_from([None, 4])), min_size=1, max_size=30),
    mode=st.sampled_from(["scan", "unroll"]),
)
def test_every_layer_has_one_place_among_its_like(layers, mode):
    moe_layers, windows = zip(*layers, strict=True)
    found = layer_segments(config(moe_layers, windows), mode)
    assert [layer for segment in found for layer in segment.layers()] == list(range(len(layers)))
    locations = [locate_layer(layer, found) for layer in range(len(layers))]
    assert len(set(locations)) == len(layers)
    alike: dict[str, set[tuple[bool, int | None]]] = {}
    for location, facts in zip(locations, layers, strict=True):
        alike.setdefault(location.path, set()).add(facts)
        assert location.slot == 0 or mode == "scan"
    assert all(len(facts) == 1 for facts in alike.values())


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="layer 3"):
        locate_layer(3, layer_segments(config((True,) * 3), "scan"))


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("layers", [8, 9, 13])
def test_stages_share_out_their_layers_evenly_and_in_order(layers, stages, virtual_stages):
    (segment,) = layer_segments(config((True,) * layers), "unroll", stages=stages, virtual_stages=virtual_stages)
    assert (segment.repeats, segment.stages, segment.virtual_stages) == (layers, stages, virtual_stages)
    filled = [
        segment.filled(stage, virtual_stage) for virtual_stage in range(virtual_stages) for stage in range(stages)
    ]
    assert sum(filled) == layers
    assert max(filled) - min(filled) <= 1
    held = segment.slots // stages
    assert segment.slots == stages * held
    slots = [locate_layer(layer, (segment,)).slot for layer in range(layers)]
    assert len(set(slots)) == layers
    passed = [slot // held for slot in slots]  # the stage of every layer, first to last
    visits = [stage for stage, before in zip(passed, [None, *passed], strict=False) if stage != before]
    assert visits == list(range(stages)) * virtual_stages


def test_what_does_not_repeat_stands_beside_the_stages():
    segments = layer_segments(config((False,) * 3 + (True,) * 9 + (False,)), "scan", stages=4)
    assert [(segment.first, segment.repeats, segment.stages) for segment in segments] == [
        (0, 3, 1),
        (3, 9, 4),
        (12, 1, 1),
    ]
    assert segments[1].slots == 12


@pytest.mark.parametrize(("layers", "stages", "virtual_stages"), [(6, 8, 1), (6, 4, 2), (1, 2, 1)])
def test_more_stages_than_layers_is_an_error(layers, stages, virtual_stages):
    with pytest.raises(
        ConfigError, match=rf"pipeline={stages}.*at least {stages * virtual_stages}.*has {layers}: use fewer"
    ):
        layer_segments(config((True,) * layers), "scan", stages=stages, virtual_stages=virtual_stages)


def busy(schedule: PipelineSchedule, decode_steps: int) -> dict[int, list[tuple[int, int, int, int]]]:
    """What every stage does, tick by tick: (tick, decode step, chunk, micro-batch)."""
    return {
        stage: [
            (tick, *slot[:3])
            for tick in range(schedule.ticks(decode_steps))
            if (slot := schedule.slot(tick, stage, decode_steps)).valid
        ]
        for stage in range(schedule.stages)
    }


@given(
    stages=st.sampled_from([1, 2, 3, 4, 8]), micro_batches=st.integers(1, 16), virtual_stages=st.integers(1, 3),
    decode_steps=st.integers(1, 4),
)  # fmt: skip
def test_every_micro_batch_passes_every_chunk_of_every_stage_in_order(
    stages, micro_batches, virtual_stages, decode_steps
):
    schedule = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
    done = busy(schedule, decode_steps)
    when = {(stage, *slot[1:]): slot[0] for stage, slots in done.items() for slot in slots}
    assert len(when) == sum(map(len, done.values())) == stages * virtual_stages * micro_batches * decode_steps
    for (stage, decode_step, virtual_stage, batch), tick in when.items():
        if stage:
            assert (
                when[stage - 1, decode_step, virtual_stage, batch] == tick - 1
            )  # what is sent is used in the next tick
        elif virtual_stage or decode_step:
            before = (decode_step, virtual_stage - 1) if virtual_stage else (decode_step - 1, virtual_stages - 1)
            assert when[stages - 1, *before, batch] < tick
        if batch:
            assert (
                when[stage, decode_step, virtual_stage, batch - 1] < tick
            )  # what stands before in a prompt is written first
    assert max(when.values()) == schedule.ticks(decode_steps) - 1
    assert schedule.idle(decode_steps) == 1 - Fraction(len(when), stages * schedule.ticks(decode_steps))


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_idle_stages_are_those_of_the_formula(stages, virtual_stages):
    for micro_batches in range(1, 17):
        idle = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches).idle()
        if virtual_stages == 1 or micro_batches >= stages:
            assert idle == Fraction(stages - 1, virtual_stages * micro_batches + stages - 1)
        else:  # a micro-batch cannot be in two virtual stages at once: stages wait for it to come round
            ticks = (virtual_stages - 1) * stages + micro_batches + stages - 1
            assert idle == 1 - Fraction(virtual_stages * micro_batches, ticks)


@pytest.mark.parametrize("virtual_stages", [1, 2])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_decoding_stages_are_busy_once_the_pipeline_is_full(stages, virtual_stages):
    decode_steps = 6
    for micro_batches in range(1, 17):
        schedule = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
        lap = schedule.period * virtual_stages
        for slots in busy(schedule, decode_steps).values():
            full = [tick for tick, *_ in slots if 2 * lap <= tick < 4 * lap]
            assert Fraction(len(full), 2 * lap) == min(Fraction(1), Fraction(micro_batches, stages))


@given(stages=st.integers(2, 8), micro_batches=st.integers(1, 16), virtual_stages=st.integers(1, 2))
def test_only_what_is_used_is_sent(stages, micro_batches, virtual_stages):
    schedule = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
    sent = sum(len(schedule.sends(tick)) for tick in range(schedule.ticks()))
    assert sent == micro_batches * (stages * virtual_stages - 1)

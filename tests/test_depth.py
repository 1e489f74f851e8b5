"""Alike layers are found and stacked; every layer has one place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig, MoEConfig, RopeConfig
from jaxmoe.depth import Segment, place_of, segments


def config(moe_layers: tuple[bool, ...], windows: tuple[int | None, ...] | None = None) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=len(moe_layers),
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=8, rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4), moe_layers=moe_layers, sliding_windows=windows or (None,) * len(moe_layers),
        moe=MoEConfig(num_experts=2, num_experts_per_tok=1, intermediate_size=8, norm_topk_prob=True),
    )  # fmt: skip


def shapes(found: tuple[Segment, ...]) -> list[tuple[int, int, int]]:
    return [(part.first, part.period, part.repeats) for part in found]


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
    assert shapes(segments(config(moe_layers, windows), "scan")) == expected


@given(
    layers=st.lists(st.tuples(st.booleans(), st.sampled_from([None, 4])), min_size=1, max_size=30),
    kind=st.sampled_from(["scan", "unroll"]),
)
def test_every_layer_has_one_place_among_its_like(layers, kind):
    moe_layers, windows = zip(*layers, strict=True)
    found = segments(config(moe_layers, windows), kind)
    assert [layer for part in found for layer in part.layers()] == list(range(len(layers)))
    places = [place_of(layer, found) for layer in range(len(layers))]
    assert len(set(places)) == len(layers)
    alike: dict[str, set[tuple[bool, int | None]]] = {}
    for (path, index), facts in zip(places, layers, strict=True):
        alike.setdefault(path, set()).add(facts)
        assert index == 0 or kind == "scan"
    assert all(len(facts) == 1 for facts in alike.values())


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="layer 3"):
        place_of(3, segments(config((True,) * 3), "scan"))

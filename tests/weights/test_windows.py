"""Weight slices in windows: the index finds what testing every weight slice finds, and tests no more weight slices than
a window holds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from jaxmoe.families import FAMILIES, WeightSlice, read_config, weight_slices
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes
from jaxmoe.parallel.stages import layer_segments
from jaxmoe.weights import windows
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.windows import WeightSliceIndex, Window, intersect, overlap

from ..conftest import mesh_of


@pytest.mark.parametrize("name", ["qwen2_moe_sparse_step", "olmoe_clip_qkv", "deepseek_v3_groups", "gpt_oss_window"])
def test_pieces_inside_a_window_are_those_that_testing_all_finds(name, tiny_dir):
    config = read_config(read_json(tiny_dir(name) / "config.json"))
    segments = layer_segments(config, "scan")
    sizes = [array_sizes(config, MeshPlacement(mesh=mesh_of("tensor=2,expert=4")))] * len(segments)
    by_path: dict[str, list[WeightSlice]] = defaultdict(list)
    for weight_slice in weight_slices(config, sizes, FAMILIES[config.family].names, segments):
        by_path[weight_slice.path].append(weight_slice)
    rng = np.random.default_rng(0)
    for parts in by_path.values():
        dsts = [weight_slice.dst for weight_slice in parts]
        ends = [max(at + 1 if isinstance(at, int) else at.stop for at in dim) for dim in zip(*dsts, strict=True)]
        found = WeightSliceIndex(parts)
        for _ in range(20):
            # some reach past the last weight slice
            cuts = [sorted(rng.choice(end + 2, 2, replace=False)) for end in ends]
            window: Window = tuple((int(low), int(high)) for low, high in cuts)
            expected = [
                (weight_slice, *hit) for weight_slice in parts if (hit := overlap(weight_slice, window)) is not None
            ]
            inside = list(found.inside(window))
            assert len(inside) == len(expected)
            assert all(hit in expected for hit in inside)


def test_each_piece_is_tested_only_with_its_own_window(monkeypatch):
    num_layers, num_experts, width, ffn = 12, 16, 4, 6
    parts = [
        WeightSlice(
            key=f"{layer}.{expert}.{part}", key_shape=(ffn, width), src=(slice(0, ffn), slice(0, width)),
            path="gate_up", dst=(layer, expert, slice(0, width), part, slice(0, ffn)), transpose=True,
        )
        for layer in range(num_layers) for expert in range(num_experts) for part in range(2)
    ]  # fmt: skip
    tested = []
    monkeypatch.setattr(
        windows,
        "overlap",
        lambda weight_slice, window: tested.append(weight_slice.key) or overlap(weight_slice, window),
    )
    found = WeightSliceIndex(parts)
    for layer in range(num_layers):
        for expert in range(0, num_experts, 4):
            window = ((layer, layer + 1), (expert, expert + 4), (0, width), (0, 2), (0, ffn))
            assert len(list(found.inside(window))) == 8
    assert sorted(tested) == sorted(weight_slice.key for weight_slice in parts)


def test_windows_intersect_where_every_dim_does():
    assert intersect(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4), (2, 6)), ((4, 9), (0, 3))) is None

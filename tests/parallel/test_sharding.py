from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.config import ModelConfig, RopeConfig
from jaxmoe.parallel.layouts import LAYOUTS
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes

from ..conftest import mesh_of


def config(heads: int, kv_heads: int, **changes) -> ModelConfig:
    values = dict(
        family="llama", vocab_size=97, hidden_size=16, intermediate_size=30, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4, max_position_embeddings=32,
        rms_norm_eps=1e-6, rope=RopeConfig(theta=1e4), moe_layers=(False,), sliding_windows=(None,),
    )  # fmt: skip
    return ModelConfig(**(values | changes))


@settings(max_examples=80, deadline=None)
@given(kv_heads=st.integers(1, 12), groups=st.integers(1, 9), tensor=st.sampled_from([1, 2, 4, 8]))
def test_every_query_head_has_a_slot_of_its_own_beside_its_key_head(kv_heads, groups, tensor):
    model = config(kv_heads * groups, kv_heads)
    sizes = array_sizes(model, MeshPlacement(mesh=mesh_of(f"tensor={tensor}")))
    assert sizes.kv_slots % tensor == 0
    slots = [sizes.query_slot(model, head) for head in range(kv_heads * groups)]
    assert len(set(slots)) == len(slots)
    for head, (slot, place) in enumerate(slots):
        assert slot in sizes.key_value_slots(head // groups)
        assert 0 <= place < sizes.group_slots
        assert slot < sizes.kv_slots
    if kv_heads % tensor == 0:
        assert (sizes.kv_slots, sizes.group_slots) == (kv_heads, groups)


def test_one_device_needs_no_padding():
    sizes = array_sizes(config(6, 3), MeshPlacement(mesh=mesh_of("data=1")))
    assert (sizes.vocab, sizes.ffn, sizes.kv_slots, sizes.kv_copies, sizes.group_slots) == (97, 30, 3, 1, 2)


def test_an_unknown_dim_is_an_error_and_dims_never_look_like_axes():
    placement = MeshPlacement(mesh=mesh_of("tensor=8"))
    with pytest.raises(KeyError, match="heads"):
        placement.spec("heads")
    for layout in LAYOUTS.values():
        assert not set(layout.table) & set(placement.mesh.axis_names)

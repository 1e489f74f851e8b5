"""Communication is a contract: what a compiled step holds is what was planned, no more and no less."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxmoe.aot.hlo_collectives import collectives, collectives_and_padding
from jaxmoe.engine.batch import StepBucket
from jaxmoe.errors import ConfigError
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.ops.native import find_compiler
from jaxmoe.parallel.collectives import CollectiveOp

from ..conftest import MESHES_OF_8, NATIVE, XLA, mesh_of
from .programs import assert_nothing_is_copied, step_program

pytestmark = pytest.mark.usefixtures("few_block_sizes")
SWEEP = pytest.mark.sweep
FAMILY_CASES = ["llama_llama3", "qwen2_moe_shared", "qwen3_moe_sparse_step", "olmoe_full_norm", "mixtral_six_experts"]
FAMILY_CASES += ["deepseek_v3_groups", "gpt_oss_window", "llama4_text_scout"]


def bucket_for(llm, num_rows: int, blocks: int = 0) -> StepBucket:
    return StepBucket(seq_slots=num_rows // llm._runner.num_ranks or 1, blocks=blocks, block_tokens=8, pages=3)


def assert_as_planned(llm, bucket: StepBucket):
    program = step_program(llm, bucket, decode_steps=1 if bucket.blocks else 2)
    assert collectives(program.as_text(), llm.mesh) == llm._runner.traffic.planned(bucket)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=() if mesh in ("data=8,tensor=1,expert=1", "data=1,tensor=2,expert=4") else SWEEP)
        for mesh in MESHES_OF_8
    ],
)
def test_decode_of_an_moe_holds_exactly_the_planned_collectives(mesh, tiny_llm):
    llm = tiny_llm("qwen3_moe_norm", mesh, XLA)
    assert_as_planned(llm, bucket_for(llm, 8))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.optimized if name in ("qwen2_moe_shared", "gpt_oss_window") else SWEEP)
        for name in FAMILY_CASES
    ],
)
def test_decode_of_every_kind_of_layer_holds_exactly_the_planned_collectives(name, tiny_llm):
    llm = tiny_llm(name, "data=2,tensor=2,expert=2", XLA)
    assert_as_planned(llm, bucket_for(llm, 8))


def test_the_plan_reads_as_the_papers_say(tiny_llm):
    """Two all-reduces a layer over tensor, one dispatch and one combine an MoE layer over expert, nothing else."""
    llm = tiny_llm("qwen3_moe_norm", "data=2,tensor=2,expert=2", XLA)
    config, layers = llm.config, llm.config.num_hidden_layers
    bucket = bucket_for(llm, 8)
    tokens, width, share = bucket.num_tokens, config.hidden_size, config.moe.num_experts // 2
    inside = llm._runner.traffic.planned(bucket)
    inside -= {CollectiveOp(op="all-gather", axes=("tensor",), result_bytes=tokens * (config.vocab_size + 1) * 4): 1}
    assert inside == {
        CollectiveOp(op="all-reduce", axes=("tensor",), result_bytes=tokens * width * 4): 2 * layers + 1,
        CollectiveOp(op="all-to-all", axes=("expert",), result_bytes=2 * tokens * (width + share) * 4): layers,
        CollectiveOp(op="all-to-all", axes=("expert",), result_bytes=2 * tokens * width * 4): layers,
    }


def test_all_gather_dispatch_has_its_own_contract(tiny_llm):
    llm = tiny_llm("mixtral_six_experts", "data=2,tensor=2,expert=2", KernelConfig(dispatch="all_gather"))
    assert_as_planned(llm, bucket_for(llm, 8))


@pytest.mark.parametrize("mesh", ["data=2,tensor=2,expert=2", "tensor=8"])
def test_native_kernels_hold_the_same_collectives(mesh, tiny_llm):
    if find_compiler() is None:  # what a user without a compiler sees
        with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
            tiny_llm("qwen2_moe_shared", mesh, NATIVE)
        return
    llm = tiny_llm("qwen2_moe_shared", mesh, NATIVE)
    assert_as_planned(llm, bucket_for(llm, 8))


@pytest.mark.parametrize(
    "mesh",
    [pytest.param("data=2,tensor=2,expert=2", marks=pytest.mark.optimized), pytest.param("tensor=8", marks=SWEEP)],
)
def test_a_step_with_prompts_holds_exactly_the_planned_collectives(mesh, tiny_llm):
    llm = tiny_llm("qwen3_moe_norm", mesh, XLA)
    assert_as_planned(llm, bucket_for(llm, 8, blocks=2))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("llama_llama3", "data=2,tensor=4"), ("qwen3_moe_norm", "data=2,tensor=2,expert=2")],
)
def test_a_step_that_samples_several_tokens_of_a_row_holds_exactly_the_planned_collectives(name, mesh, tiny_llm):
    llm = tiny_llm(name, mesh, XLA)
    bucket = replace(bucket_for(llm, 8, blocks=2), logits_per_slot=2)
    assert_as_planned(llm, bucket)
    shards = llm.mesh.shape["tensor"]
    logits_bytes = 2 * bucket.seq_slots * -(-llm.config.vocab_size // shards) * shards * 4
    gathered = CollectiveOp(op="all-gather", axes=("tensor",), result_bytes=logits_bytes)
    assert llm._runner.traffic.planned(bucket)[gathered] == 1


def test_no_weight_is_copied_and_pages_are_donated(tiny_llm):
    llm = tiny_llm("qwen3_moe_norm", "data=2,tensor=2,expert=2", XLA)
    assert_nothing_is_copied(llm, step_program(llm, bucket_for(llm, 8), decode_steps=2))


def test_a_loop_counts_as_often_as_it_iterates():
    mesh = mesh_of("tensor=8")
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("tensor",), ()))

    def layers(x, w):
        def layer(x, _):
            return jax.lax.with_sharding_constraint(x @ w, whole), None

        def body(_, x):
            return jax.lax.scan(layer, x, None, length=3)[0]

        return jax.lax.fori_loop(0, 2, body, x)

    x = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=whole)
    w = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=split)
    found = collectives(jax.jit(layers).lower(x, w).compile().as_text(), mesh)
    assert found == {CollectiveOp(op="all-reduce", axes=("tensor",), result_bytes=8 * 8 * 4): 6}


_TPU_TEXT = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce-start = ((f32[8]), f32[8]) all-reduce-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %permute = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %r = ((f32[6,2], s64[8]), f32[9,2]{1,0:S(7)}) ragged-all-to-all-start(%z), replica_groups=[1,8]<=[8]
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(94)
  %at = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%other (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %while.1 = (s32[], f32[8]) while(%t), condition=%other, body=%body
}
"""


def test_turns_are_read_from_the_condition_where_nothing_else_says_them():
    """As the TPU compiler prints its loops and the operations that go on beside others."""
    mesh = mesh_of("tensor=8")
    assert collectives(_TPU_TEXT, mesh) == {
        CollectiveOp(op="all-reduce", axes=("tensor",), result_bytes=32): 95,
        CollectiveOp(op="collective-permute", axes=("tensor",), result_bytes=16): 95,
        CollectiveOp(op="ragged-all-to-all", axes=("tensor",), result_bytes=72): 95,
    }


_SCATTER_TEXT = """
%all-reduce-scatter.1 (input: bf16[4,136,1024]) -> bf16[136,8,128] {
  %input = bf16[4,136,1024]{2,1,0} parameter(0)
  %all-reduce.1 = bf16[544,8,128]{2,1,0} all-reduce(%bitcast.2), replica_groups={{0,1,2,3}}
  ROOT %part = bf16[136,8,128]{2,1,0} dynamic-slice(%all-reduce.1, %at, %zero), dynamic_slice_sizes={136,8,128}
}

%all-reduce-scatter.2 (input.1: bf16[4,520,7168]) -> bf16[3648,8,128] {
  %input.1 = bf16[4,520,7168]{2,1,0} parameter(0)
  %pad = bf16[14592,8,128]{2,1,0} pad(%bitcast.3, %none), padding=0_32x0_0x0_0
  %all-reduce.2 = bf16[14592,8,128]{2,1,0} all-reduce(%pad), replica_groups={{0,1,2,3}}
  ROOT %part.1 = bf16[3648,8,128]{2,1,0} dynamic-slice(%all-reduce.2, %at, %zero), dynamic_slice_sizes={3648,8,128}
}

ENTRY %main (x: bf16[4,136,1024]) -> bf16[136,1024] {
  %fusion = bf16[136,8,128]{2,1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce = bf16[544,8,128]{2,1,0} all-reduce(%y), replica_groups={{0,1,2,3}}
  %fusion.1 = bf16[3648,8,128]{2,1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.2
  %slice = bf16[24,8,128]{2,1,0} slice(%fusion.1), slice={[3624:3648], [0:8], [0:128]}
  %moved = (bf16[24,8,128], bf16[24,8,128], u32[], u32[]) collective-permute-start(%slice), source_target_pairs={{0,1}}
  %other = bf16[8,128]{1,0} collective-permute(%y), source_target_pairs={{0,1}}
}
"""


def test_an_all_reduce_of_which_a_slice_stays_is_a_reduce_scatter():
    """As the TPU compiler prints them: without padding, and with it and what then moves on to the next device."""
    found, padding = collectives_and_padding(_SCATTER_TEXT, mesh_of("tensor=4"))
    even, padded = 136 * 1024 * 2, 520 * 7168 * 2
    assert found == {
        CollectiveOp(op="reduce-scatter", axes=("tensor",), result_bytes=even): 1,
        CollectiveOp(op="reduce-scatter", axes=("tensor",), result_bytes=padded): 1,
        CollectiveOp(op="all-reduce", axes=("tensor",), result_bytes=4 * even): 1,
        CollectiveOp(op="collective-permute", axes=("tensor",), result_bytes=8 * 128 * 2): 1,
    }
    assert padding == (3648 - 3640 + 24) * 8 * 128 * 2 / (even + padded)


def _program(*lines: str) -> str:
    return "\n".join(["ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}"])


_ALL, _PAIRS = "replica_groups=[1,8]<=[8]", "replica_groups=[4,2]<=[8]"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"%a = (f32[1000], f32[8]) all-reduce-start(%x, %y), {_ALL}", ("all-reduce", "tensor", 4032)),
        (f"%a = (f32[8], f32[64]) all-gather-start(%x), {_ALL}", ("all-gather", "tensor", 256)),
        (f"%a = ((f32[8], f32[4]), f32[64], f32[32]) all-gather-start(%x, %y), {_ALL}", ("all-gather", "tensor", 384)),
        (
            f"%a = ((f32[4], f32[4]), f32[64], u32[], u32[]) ragged-all-to-all-start(%x, %y), {_ALL}",
            ("ragged-all-to-all", "tensor", 256),
        ),
        (f"%a = f32[8] all-reduce(%x), {_PAIRS}", ("all-reduce", "2 ranks of tensor", 32)),
    ],
)
def test_joined_ones_count_whole_and_ones_of_a_few_ranks_are_told_apart(line, found):
    """As compilers print several that they made into one, and what no layout plans."""
    op, axis, size = found
    assert collectives(_program(line), mesh_of("tensor=8")) == {CollectiveOp(op=op, axes=(axis,), result_bytes=size): 1}


@pytest.mark.parametrize("op", ["collective-broadcast", "send", "recv"])
def test_other_ways_to_tell_something_are_not_passed_over(op):
    with pytest.raises(ValueError, match=f"a collective that is not known here, {op}"):
        collectives(_program(f"%a = f32[1000000] {op}(%x), channel_id=1"), mesh_of("tensor=8"))


def test_an_unplanned_collective_is_seen():
    """A weight gathered by mistake shows up, so the comparison above can fail."""
    mesh = mesh_of("tensor=8")
    spec = jax.sharding.PartitionSpec
    split, whole = (jax.sharding.NamedSharding(mesh, s) for s in (spec("tensor"), spec()))
    gathered = jax.jit(lambda w: w * 2, in_shardings=split, out_shardings=whole).lower(np.ones((16, 4), np.float32))
    expected = CollectiveOp(op="all-gather", axes=("tensor",), result_bytes=16 * 4 * 4)
    assert collectives(gathered.compile().as_text(), mesh) == {expected: 1}

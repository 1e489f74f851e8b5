"""Loading: every parameter on a mesh as assembled from whole tensors, every byte read once, all keys accounted for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxmoe import LLM, CheckpointError
from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families import read_config
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.parallel.stages import LayerSegment, LayersMode
from jaxmoe.weights import load, windows
from jaxmoe.weights.checkpoint import open_tensors, read_json
from jaxmoe.weights.params import ParamInfo, parameter_table
from jaxmoe.weights.safetensors_file import TensorInfo

from ..conftest import ONE_DEVICE, mesh_of
from ..tiny.cases import CASES
from .assembly import Assembly

NAMES = [case.name for case in CASES]
MESHES = ("data=2,tensor=2,expert=2", "tensor=8", "tensor=2,expert=4")


class Prepared(NamedTuple):
    """All that loading takes."""

    directory: Path
    tensors: dict[str, TensorInfo]
    table: list[ParamInfo]
    config: ModelConfig
    sizes: list[ArraySizes]
    segments: tuple[LayerSegment, ...]

    def load(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[jax.Array]:
        parts = load.assign_weight_slices(self.directory, self.tensors, self.config, self.sizes, self.segments)
        return load.load_params(self.tensors, self.table, parts, self.config, on_progress=on_progress)


def _prepare(
    directory: Path, mesh: str, dtype: str = "float32", layers: LayersMode = "scan", chunks: int = 1
) -> Prepared:
    config = read_config(read_json(directory / "config.json"))
    placement = MeshPlacement(mesh=mesh_of(mesh), virtual_stages=chunks)
    model = abstract_model(config, placement, dtype=dtype, kernels=KernelConfig(layers=layers))
    table = parameter_table(nnx.state(model), placement)
    sizes = segment_sizes(config, placement, model.layer_segments)
    return Prepared(directory, open_tensors(directory), table, config, sizes, model.layer_segments)


def _assert_loads_as_assembled(prepared: Prepared) -> None:
    tensors = {key: info.read_rows(0, info.shape[0]) for key, info in prepared.tensors.items()}
    expected = Assembly(prepared.config, prepared.sizes, tensors).params(prepared.segments)
    arrays = prepared.load()
    assert {info.path for info in prepared.table} == expected.keys()
    for info, array in zip(prepared.table, arrays, strict=True):
        assert array.sharding == info.sharding
        assert array.dtype == info.dtype
        np.testing.assert_array_equal(np.asarray(array), expected[info.path].astype(info.dtype), err_msg=info.path)


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """The bytes of each read of rows."""
    read_rows, counts = TensorInfo.read_rows, []

    def spy(self: TensorInfo, start: int, stop: int) -> np.ndarray:
        rows = read_rows(self, start, stop)
        counts.append(rows.nbytes)
        return rows

    monkeypatch.setattr(TensorInfo, "read_rows", spy)
    return counts


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_what_whole_tensors_give(name, mesh, tiny_dir):
    _assert_loads_as_assembled(_prepare(tiny_dir(name), mesh))


@pytest.mark.parametrize("name", ["qwen2_moe_sparse_step", "llama_mha"])
def test_layers_that_lie_by_themselves_load_too(name, tiny_dir):
    _assert_loads_as_assembled(_prepare(tiny_dir(name), MESHES[0], layers="unroll"))


@pytest.mark.parametrize(("name", "chunks"), [("qwen2_moe_mlp_only", 1), ("mistral_window", 1), ("llama_mha", 1)])
def test_stages_hold_their_layers_and_the_rest_is_split_over_all_of_them(name, chunks, tiny_dir):
    prepared = _prepare(tiny_dir(name), "pipeline=2,tensor=2,expert=2", chunks=chunks)
    _assert_loads_as_assembled(prepared)
    for info in prepared.table:
        first = info.sharding.shard_shape(info.shape)[0]
        staged = any(
            info.path.startswith(f"segments/{n}/") for n, segment in enumerate(prepared.segments) if segment.stages == 2
        )
        if staged or info.path == "embed":
            assert first * 2 <= info.shape[0]


def test_the_meshes_pad_and_copy(tiny_dir):
    """The cases above do hold key/value heads fewer than tensor, and experts and vocabularies that do not divide."""
    heads = _prepare(tiny_dir("qwen2_tied"), "tensor=8")
    assert heads.sizes[0].kv_slots > heads.config.num_key_value_heads
    assert heads.sizes[0].kv_copies > 1
    assert heads.sizes[0].vocab > heads.config.vocab_size
    experts = _prepare(tiny_dir("mixtral_six_experts"), "tensor=2,expert=4")
    assert experts.sizes[0].moe_experts == 8 > experts.config.moe.num_experts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_any_dtype_is_cast_from_the_files(dtype, tiny_dir):
    _assert_loads_as_assembled(_prepare(tiny_dir("qwen3_moe_norm"), "data=2,tensor=2,expert=2", dtype))
    _assert_loads_as_assembled(_prepare(tiny_dir("olmoe_clip_qkv"), "data=2,tensor=2,expert=2", dtype))


ONE_MESH_EACH = [
    pytest.param(name, mesh, marks=() if (number + at) % len(MESHES) == 0 else pytest.mark.sweep)
    for number, name in enumerate(NAMES)
    for at, mesh in enumerate(MESHES)
]


@pytest.mark.parametrize(("name", "mesh"), ONE_MESH_EACH)
def test_every_byte_is_read_once(name, mesh, tiny_dir, bytes_read):
    prepared = _prepare(tiny_dir(name), mesh)
    prepared.load()
    assert sum(bytes_read) == sum(info.num_bytes for info in prepared.tensors.values())


@pytest.mark.parametrize(
    ("name", "mesh"), [("qwen2_moe_sparse_step", "tensor=2"), ("mixtral_window", "expert=2"), ("llama_mha", "data=2")]
)
def test_parameters_above_the_staging_limit_come_in_blocks(name, mesh, tiny_dir, bytes_read, monkeypatch):
    monkeypatch.setattr(load, "_STAGING_BYTES", 4000)
    monkeypatch.setattr(load, "_staged_whole", lambda devices: False)
    writes, hits = [], []
    write_block, overlap = load._write_block, windows.overlap
    monkeypatch.setattr(windows, "overlap", lambda *args: hits.append(overlap(*args)) or hits[-1])
    monkeypatch.setattr(load, "_write_block", lambda *args: writes.append(args[1].nbytes) or write_block(*args))
    prepared = _prepare(tiny_dir(name), mesh)
    _assert_loads_as_assembled(prepared)
    assert len(writes) > len(prepared.table)
    assert max(writes) <= 4000
    assert hits
    assert None not in hits  # no weight slice is tested with a block it has no part in
    num_bytes = sum(info.num_bytes for info in prepared.tensors.values())
    assert sum(bytes_read) - num_bytes <= 1.05 * num_bytes  # the comparison itself reads each tensor once


def test_blocks_tile_a_parameter_and_keep_the_limit(monkeypatch):
    monkeypatch.setattr(load, "_STAGING_BYTES", 512)
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = [int(n) for n in rng.integers(1, 5, 3)]
        shares = tuple(int(n) for n in rng.integers(1, 12, 3))
        shape = tuple(share * part for share, part in zip(shares, parts, strict=True))
        order = [int(dim) for dim in rng.permutation(3)]
        covered = np.zeros(shape, int)
        for block in load._blocks(tuple((0, n) for n in shape), 4, order, shares):
            covered[tuple(slice(*bounds) for bounds in block)] += 1
            assert math.prod(high - low for low, high in block) * 4 <= 512
        assert (covered == 1).all()


def test_a_row_beyond_the_limit_is_still_one_block(monkeypatch):
    monkeypatch.setattr(load, "_STAGING_BYTES", 16)
    assert list(load._blocks(((0, 2), (0, 100)), 4, [0], (1, 100))) == [((0, 1), (0, 100)), ((1, 2), (0, 100))]


def test_progress_moves_with_every_read(tiny_dir, bytes_read, monkeypatch):
    monkeypatch.setattr(load, "_READ_BYTES", 1000)
    seen: list[tuple[int, int]] = []
    llm = LLM.load(
        tiny_dir("llama_mha"),
        mesh=mesh_of(ONE_DEVICE),
        dtype="bfloat16",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(leaf.nbytes for leaf in llm._runner.leaves)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    steps = [after - before for (before, _), (after, _) in pairwise(seen)]
    assert len(steps) == len(bytes_read) > 5 * len(llm._runner.leaves)
    assert 0 < min(steps) <= max(steps) <= 500  # the files hold float32


@pytest.mark.parametrize("staged_whole", [True, False])
@pytest.mark.parametrize(("name", "mesh"), [("qwen2_tied", "tensor=8"), ("mixtral_six_experts", "tensor=2,expert=4")])
def test_progress_ends_each_parameter_at_its_bytes(name, mesh, staged_whole, tiny_dir, monkeypatch):
    """Whatever of it is padding, a copy of a head, or held by several devices; told by the thread that loads."""
    monkeypatch.setattr(load, "_STAGING_BYTES", 4000)
    monkeypatch.setattr(load, "_staged_whole", lambda devices: staged_whole)
    prepared, seen, threads = _prepare(tiny_dir(name), mesh), [], set()
    prepared.load(lambda done, total: seen.append((done, total)) or threads.add(threading.get_ident()))
    ends = list(accumulate(info.num_bytes for info in prepared.table))
    assert {total for _, total in seen} == {ends[-1]}
    dones = [done for done, _ in seen]
    assert dones == sorted(dones)
    assert set(ends) <= set(dones)
    assert threads == {threading.get_ident()}


def test_reading_ends_where_progress_raises(tiny_dir, monkeypatch):
    monkeypatch.setattr(load, "_READ_BYTES", 1)  # a row
    reads, read_rows = [], TensorInfo.read_rows

    def slow(self: TensorInfo, start: int, stop: int) -> np.ndarray:
        reads.append(self.name)
        time.sleep(0.01)
        return read_rows(self, start, stop)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(TensorInfo, "read_rows", slow)
    prepared = _prepare(tiny_dir("llama_mha"), ONE_DEVICE)
    assert prepared.table[0].path == "embed"  # of 97 rows
    with pytest.raises(KeyboardInterrupt):
        prepared.load(stop)
    assert len(reads) < 50


# --- keys and shapes ---


def _changed(tiny_dir, tmp_path: Path, name: str, *, drop=(), add=(), replace=()) -> Path:
    """A copy of a single-file case with tensors left out, added or replaced."""
    tensors = load_file(tiny_dir(name) / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if key not in drop} | dict(add) | dict(replace)
    (tmp_path / "config.json").write_bytes((tiny_dir(name) / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def _load(directory: Path) -> LLM:
    return LLM.load(directory, mesh=mesh_of(ONE_DEVICE))


def test_missing_unused_and_misshapen_keys_stand_in_one_error(tiny_dir, tmp_path, bytes_read):
    directory = _changed(
        tiny_dir,
        tmp_path,
        "mixtral_window",
        drop=["model.layers.1.block_sparse_moe.experts.4.w2.weight", "model.norm.weight"],
        add={"model.layers.2.input_layernorm.weight": np.ones(36, np.float32)},
        replace={"model.layers.0.self_attn.k_proj.weight": np.ones((24, 36), np.float32)},
    )
    with pytest.raises(CheckpointError) as caught:
        _load(directory)
    message = str(caught.value)
    assert "2 missing: model.layers.1.block_sparse_moe.experts.4.w2.weight, model.norm.weight" in message
    assert "1 unused: model.layers.2.input_layernorm.weight" in message
    assert "1 misshapen: model.layers.0.self_attn.k_proj.weight [24, 36] instead of [36, 36]" in message
    assert str(directory) in message
    assert "\n" not in message
    assert bytes_read == []  # nothing is read before


def test_a_long_list_of_keys_is_counted_and_cut(tiny_dir, tmp_path):
    extra = {f"extra.{number:03}": np.ones(1, np.float32) for number in range(50)}
    with pytest.raises(CheckpointError, match=r"50 unused: extra.000, .*extra.019, and 30 more"):
        _load(_changed(tiny_dir, tmp_path, "llama_mha", add=extra))


def test_a_transposed_tensor_is_misshapen_even_if_its_size_fits(tiny_dir, tmp_path):
    key = "model.layers.0.mlp.gate_proj.weight"
    wrong = {key: np.ones((48, 84), np.float32)}
    with pytest.raises(CheckpointError, match=rf"1 misshapen: {key} \[48, 84\] instead of \[84, 48\]"):
        _load(_changed(tiny_dir, tmp_path, "llama_mha", replace=wrong))


def test_rotary_tables_and_a_tied_heads_copy_may_stand_unused(tiny_dir, tmp_path):
    embedding = load_file(tiny_dir("mixtral_window") / "model.safetensors")["model.embed_tokens.weight"]
    tied = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": embedding}
    assert _load(_changed(tiny_dir, tmp_path, "mixtral_window", add=tied)).config.tie_word_embeddings


def test_an_untied_head_is_needed(tiny_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight"):
        _load(_changed(tiny_dir, tmp_path, "llama_mha", drop=["lm_head.weight"]))


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.float64])
def test_weights_that_are_no_plain_floats_are_named(tiny_dir, tmp_path, dtype, bytes_read):
    wrong = {"model.norm.weight": np.ones(48, dtype)}
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' has dtype [IF]\d+; use F32, F16, BF16"):
        _load(_changed(tiny_dir, tmp_path, "llama_mha", replace=wrong))
    assert bytes_read == []


def test_a_truncated_file_is_an_error_before_anything_lands(tiny_dir, tmp_path):
    path = _changed(tiny_dir, tmp_path, "llama_mha") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError, match=r"model.safetensors.*fetch it again"):
        _load(tmp_path)
    assert len(jax.live_arrays()) <= before


# --- numbers that a dtype does not hold ---


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [("float16", 65520, "6.552e+04"), ("float16", -7e4, "-7e+04"), ("bfloat16", 3.3961776e38, "3.396e+38")],
)
def test_a_number_beyond_the_dtype_is_named(dtype, value, said, tiny_dir, tmp_path):
    """6.552e+04 is the least number that float16 rounds to infinity."""
    key = "model.layers.1.mlp.down_proj.weight"
    tensor = load_file(tiny_dir("llama_mha") / "model.safetensors")[key].copy()
    tensor[3, 5] = value
    directory = _changed(tiny_dir, tmp_path, "llama_mha", replace={key: tensor})
    with pytest.raises(CheckpointError) as caught:
        LLM.load(directory, mesh=mesh_of("tensor=2"), dtype=dtype)
    words = f"tensor {key!r} holds {said}, outside the range of {dtype}: choose a dtype of larger range (dtype"
    assert str(caught.value).startswith(words)
    assert LLM.load(directory, mesh=mesh_of(ONE_DEVICE), dtype="float32").config


def test_infinities_of_the_file_and_numbers_that_fit_are_kept(tiny_dir, tmp_path):
    key = "model.layers.1.mlp.down_proj.weight"
    tensor = load_file(tiny_dir("llama_mha") / "model.safetensors")[key].copy()
    tensor[0, :4] = np.inf, -np.inf, np.nan, np.nextafter(np.float32(65520), np.float32(0))
    prepared = _prepare(_changed(tiny_dir, tmp_path, "llama_mha", replace={key: tensor}), ONE_DEVICE, "float16")
    with np.errstate(over="ignore"):
        _assert_loads_as_assembled(prepared)


def test_a_number_that_is_not_finite_is_not_quantized_on_load(tiny_dir, tmp_path):
    key = "model.layers.1.mlp.down_proj.weight"
    tensor = load_file(tiny_dir("llama_mha") / "model.safetensors")[key].copy()
    tensor[3, 5] = np.inf
    directory = _changed(tiny_dir, tmp_path, "llama_mha", replace={key: tensor})
    with pytest.raises(CheckpointError, match=f"tensor '{key}' contains a number that is not finite"):
        LLM.load(directory, mesh=mesh_of(ONE_DEVICE), weights_dtype="int8")

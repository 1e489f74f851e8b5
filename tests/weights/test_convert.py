"""Conversion by value: round trips, what travels along, loading the result on other meshes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe import LLM
from jaxmoe.assets import asset_dir
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.weights import shards
from jaxmoe.weights.checkpoint import BESIDE, INDEX, open_tensors, read_json
from jaxmoe.weights.convert import convert
from jaxmoe.weights.journal import partial_path
from jaxmoe.weights.manifest import read_manifest
from jaxmoe.weights.verify import problems

from ..conftest import mesh_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.quantized import write_quantized
from .hf_checkpoints import WIDTHS, bytes_of, contents, every_dtype, random_tensor, write_checkpoint_dir

CASE = "mixtral_window"


@pytest.fixture
def source(tmp_path) -> Path:
    return every_dtype(tmp_path / "source")


def test_the_embedded_default_comes_back_as_it_was(tmp_path):
    demo = asset_dir("checkpoints") / "demo"
    convert(demo, tmp_path / "orbax", mesh="expert=8")
    convert(tmp_path / "orbax", tmp_path / "hf", verify=True)
    assert bytes_of(tmp_path / "hf") == bytes_of(tmp_path / "orbax") == bytes_of(demo)
    manifests = [read_manifest(tmp_path / kind) for kind in ("orbax", "hf")]
    sums = [{name: entry.sha256 for name, entry in manifest.tensors.items()} for manifest in manifests]
    assert sums[0] == sums[1]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for kind in ("orbax", "hf"):
            assert (tmp_path / kind / name).read_bytes() == (demo / name).read_bytes()


def test_every_dtype_both_ways_and_what_travels_along(source, tmp_path):
    before = contents(source)
    report = convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", to="hf")
    expected = bytes_of(source)
    assert {dtype for dtype, _, _ in expected.values()} == set(WIDTHS)
    for kind in ("orbax", "hf", "again"):
        assert bytes_of(tmp_path / kind) == expected
        assert problems(tmp_path / kind) == []
        templates = ("chat_template.jinja", "additional_chat_templates/rag.jinja")
        for name in ("config.json", "tokenizer.json", "special_tokens_map.json", *templates):
            assert (tmp_path / kind / name).read_bytes() == before[name]
        assert not (tmp_path / kind / "modeling.py").exists()
        assert not (tmp_path / kind / "training_args.bin").exists()
    assert report.left_behind == ("modeling.py", "training_args.bin")
    assert contents(source) == before
    assert not partial_path(tmp_path / "orbax").exists()


def test_several_shards_and_their_index(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.ShardSink.__init__, "__defaults__", (700,))
    convert(source, tmp_path / "hf", to="hf")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(len(content) for *_, content in bytes_of(source).values())
    assert bytes_of(tmp_path / "hf") == bytes_of(source)
    for name in names:  # as others read it: numpy has no names for some dtypes
        header = json.loads((tmp_path / "hf" / name).read_bytes()[8:].split(b"}}")[0] + b"}}")
        if not {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} & {"F8_E8M0"}:
            assert load_file(tmp_path / "hf" / name)
    convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    assert bytes_of(tmp_path / "orbax") == bytes_of(source)


@pytest.mark.parametrize("mesh", ["data=2,tensor=2,expert=2", "tensor=8"])
def test_a_converted_model_gives_the_same_logits_on_any_mesh(mesh, tiny_dir, tiny_llm, tmp_path):
    convert(tiny_dir(CASE), tmp_path / "orbax", mesh="expert=3")
    llm = LLM.load(tmp_path / "orbax", mesh=mesh_of(mesh), dtype="float32", verify=True)
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    np.testing.assert_array_equal(llm.last_logits(prompts), tiny_llm(CASE, mesh).last_logits(prompts))


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("fp8", "deepseek_v3_groups"), ("mxfp4", "gpt_oss_window"), ("int8-channel", "qwen3_moe_norm"),
        ("fp8-channel", "llama_llama3"),
    ],
)  # fmt: skip
def test_quantized_checkpoints_become_plain_ones(form, name, to, tmp_path):
    """Of the values that their format defines, tensor by tensor, and of the names that plain ones have."""
    case = CASES_BY_NAME[name]
    sizes = {"hidden_size": 96, "intermediate_size": 160} if form == "mxfp4" else {}
    case = replace(case, config=case.config | sizes)
    values = write_quantized(case, form, tmp_path / "quantized")
    convert(tmp_path / "quantized", tmp_path / "plain", to=to, weights_dtype="float32", ram_gib=1, verify=True)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    found = open_tensors(tmp_path / "plain")
    assert found.keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(found[key].read_rows(0, value.shape[0]), value.astype(np.float32), err_msg=key)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (CASE, {"num_hidden_layers": 10000, "num_local_experts": 10000}, "requires at least 300070002 tensors with"),
        (
            "gpt_oss_window",
            {"num_hidden_layers": 80, "num_local_experts": 10000, "layer_types": None},
            "numbers, the files have",
        ),
    ],
)
def test_a_config_far_beyond_its_files_is_said_at_once(name, changes, words, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir(name), tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "source", tmp_path / "out")
    assert time.process_time() - started < 5


def test_numbers_without_scales_are_not_taken_for_plain_ones(tmp_path):
    drop = lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight_scale_inv")  # noqa: E731
    write_quantized(CASES_BY_NAME["llama_llama3"], "fp8", tmp_path / "hf", change=drop)
    with pytest.raises(CheckpointError, match=r"o_proj.weight_scale_inv"):
        convert(tmp_path / "hf", tmp_path / "plain", weights_dtype="bfloat16")
    assert not (tmp_path / "plain").exists()


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _fp8(directory: Path, **tensors: np.ndarray) -> Path:
    """A checkpoint of no known family with a matrix a of 2 x 3 blocks, and others."""
    directory.mkdir()
    matrix = {"a": np.ones((256, 384), ml_dtypes.float8_e4m3fn), "a_scale_inv": np.ones((2, 3), np.float32)}
    save_file(matrix | tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "none", "quantization_config": FP8}))
    return directory


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a_scale_inv": np.ones((3, 2), np.float32)}, r"'a_scale_inv' has shape \[3, 2\], .* needs \[2, 3\]"),
        ({"a_scale_inv": np.ones(6, np.float32)}, r"'a_scale_inv' has shape \[6\], .* needs \[2, 3\]"),
        ({"a_scale_inv": np.ones((2, 3), np.int32)}, r"'a_scale_inv' has dtype I32; use .*scales of 'a'"),
        ({"a": np.ones(6, ml_dtypes.float8_e4m3fn)}, r"'a' has shape \[6\], which is not that of a quantized matrix"),
        (
            {"a": np.ones((256, 384), ml_dtypes.float8_e5m2)},
            r"belongs to no matrix of quant_method fp8, .* of dtype F8_E4M3",
        ),
        ({"a": np.ones((256, 384), np.float32)}, r"'a_scale_inv' of dtype F32 belongs to no matrix of quant_method"),
        ({"b_scale_inv": np.ones(2, np.float32)}, r"'b_scale_inv' of dtype F32 belongs to no matrix"),
        ({"b": np.ones(2, np.int8), "b_scale": np.ones(2, np.float32)}, r"'b' of dtype I8 belongs to no matrix"),
        ({"b_blocks": np.ones(2, np.uint8), "b_scales": np.ones(2, np.uint8)}, r"'b_blocks' of dtype U8 belongs to no"),
    ],
)
def test_scales_that_do_not_fit_are_said_before_anything_is_written(tensors, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        convert(_fp8(tmp_path / "source", **tensors), tmp_path / "out", weights_dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_plain_tensors_with_names_of_scales_are_kept(tmp_path):
    plain = {"b": np.arange(3, dtype=np.float32), "b_scale": np.arange(2, dtype=np.float32)}
    convert(_fp8(tmp_path / "source", **plain), tmp_path / "out", to="hf", weights_dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"a", "b", "b_scale"}
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value)


CHANNELS = {"strategy": "channel", "num_bits": 8, "type": "int"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNELS}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "settings", "shape"),
    [
        ({"a": ("I8", (4, 0)), "a_scale": ("F32", (4, 1))}, COMPRESSED, (4, 0)),
        ({"a": ("I8", (0, 4)), "a_scale": ("F32", (0, 1))}, COMPRESSED, (0, 4)),
        ({"a": ("F8_E4M3", (4, 0)), "a_scale_inv": ("F32", (1, 0))}, FP8, (4, 0)),
        ({"a_blocks": ("U8", (2, 0, 1, 16)), "a_scales": ("U8", (2, 0, 1))}, {"quant_method": "mxfp4"}, (2, 32, 0)),
    ],
)
def test_quantized_matrices_without_numbers(tensors, settings, shape, tmp_path):
    rng = np.random.default_rng(0)
    made = {name: random_tensor(rng, dtype, *extents) for name, (dtype, extents) in tensors.items()}
    write_checkpoint_dir(tmp_path / "source", made, quantization_config=settings)
    convert(tmp_path / "source", tmp_path / "out", weights_dtype="float32")
    assert bytes_of(tmp_path / "out") == {"a": ("F32", shape, b"")}


def test_a_config_of_any_text_is_written_again(tmp_path):
    source = write_checkpoint_dir(tmp_path / "source", {"a": ("F32", (1,), bytes(4))})
    text = '{"model_type": "none", "half": "\\ud800", "word": "\u00e9"}'
    (source / "config.json").write_text(text, encoding="utf-8")
    convert(source, tmp_path / "out", weights_dtype="float32")
    found = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert found == json.loads(text) | {"torch_dtype": "float32"}


def test_what_nvidia_says_in_a_file_beside_config_is_read(source, tmp_path):
    beside = source / BESIDE
    beside.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    convert(source, tmp_path / "bits")
    for name in ("config.json", BESIDE):
        assert (tmp_path / "bits" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(ConfigError, match="quant_method 'modelopt', which can be sized and planned"):
        convert(source, tmp_path / "out", weights_dtype="float32")
    beside.write_text("{")
    with pytest.raises(CheckpointError, match=f"{BESIDE} is not readable JSON"):
        convert(source, tmp_path / "out")


def test_what_nvidia_says_does_not_stand_beside_values(tmp_path):
    source = _fp8(tmp_path / "source")
    (source / BESIDE).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    convert(source, tmp_path / "out", weights_dtype="float32")
    assert not (tmp_path / "out" / BESIDE).exists()
    assert read_json(tmp_path / "out" / "config.json") == {"model_type": "none", "torch_dtype": "float32"}


@pytest.mark.parametrize(("form", "case"), [("fp8", "deepseek_v3_groups"), ("mxfp4", "gpt_oss_window")])
def test_quantized_checkpoints_keep_their_format(form, case, tmp_path):
    """Latent attention, and experts fused in one tensor, of which each is read by itself."""
    case = CASES_BY_NAME[case]
    sizes = {"hidden_size": 96, "intermediate_size": 160} if form == "mxfp4" else {}  # whole blocks of 32
    write_quantized(replace(case, config=case.config | sizes), form, tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "orbax")
    assert report.config_check == "shapes agree"
    assert bytes_of(tmp_path / "orbax") == bytes_of(tmp_path / "hf")
    mesh, prompts = mesh_of("tensor=2,expert=2"), [[1, 2, 3, 4, 5], [7, 8]]
    loaded = [LLM.load(tmp_path / kind, mesh=mesh, dtype="float32") for kind in ("hf", "orbax")]
    np.testing.assert_array_equal(*(llm.last_logits(prompts) for llm in loaded))

"""What a checkpoint's tensors tell beyond its config.json: stacked experts, a tied head that is another, the dtype."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmoe import LLM
from jaxmoe.aot.request import InspectRequest
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.planner.api import PlanRequest
from jaxmoe.report.info import model_info
from jaxmoe.weights import stored
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.stored import same_values
from jaxmoe.weights.verify import problems

from ..conftest import ONE_DEVICE, mesh_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.checkpoint import tensor_shapes
from ..tiny.quantized import write_quantized
from ..tiny.stacked import read_tensors, stacked, write_stacked, write_tensors
from .hf_checkpoints import bytes_of

ALL = "data=2,tensor=2,expert=2"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# One of every family whose experts are published one by one.
EXPERTS = (
    "mixtral_window", "qwen2_moe_shared", "qwen3_moe_norm", "olmoe_clip_qkv", "deepseek_v2_lite", "deepseek_v3_groups",
    "kimi_k2_one_group", "glm4_moe_groups",
)  # fmt: skip
TIED, PLAIN = "llama_llama3", "llama_mha"  # in three files of bfloat16; one of float32


def leaves_of(directory: Path, mesh: str = ONE_DEVICE, **options) -> list[jax.Array]:
    return LLM.load(directory, mesh=mesh_of(mesh), **({"dtype": "float32"} | options))._runner.leaves


def assert_same(found: list[jax.Array], wanted: list[jax.Array]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# --- experts in one tensor ---


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_those_published_one_by_one(name, tiny_dir, tmp_path):
    directory = write_stacked(tiny_dir(name), tmp_path / "stacked")
    assert_same(leaves_of(directory, ALL), leaves_of(tiny_dir(name), ALL))
    assert model_info(directory / "config.json")["config_check"] == "shapes agree"


def test_stacked_experts_are_converted_under_their_names(tiny_dir, tmp_path):
    directory = write_stacked(tiny_dir("mixtral_window"), tmp_path / "stacked")
    assert convert(directory, tmp_path / "orbax", mesh="expert=2").config_check == "shapes agree"
    convert(tmp_path / "orbax", tmp_path / "hf", verify=True)
    assert bytes_of(tmp_path / "hf") == bytes_of(tmp_path / "orbax") == bytes_of(directory)
    assert problems(tmp_path / "orbax") == []
    assert_same(leaves_of(tmp_path / "orbax", ALL), leaves_of(tiny_dir("mixtral_window"), ALL))


def test_stacked_experts_are_quantized_on_load_and_not_by_convert(tiny_dir, tmp_path):
    directory = write_stacked(tiny_dir("qwen3_moe_norm"), tmp_path / "stacked")
    options = {"weights_dtype": "int8"}
    assert_same(leaves_of(directory, **options), leaves_of(tiny_dir("qwen3_moe_norm"), **options))
    with pytest.raises(ConfigError, match=r"family qwen3_moe holds .* in one tensor \(model.layers.0.mlp.experts"):
        convert(directory, tmp_path / "out", weights_dtype="int8")


@pytest.mark.parametrize("plain", [False, True])
def test_stacked_experts_that_are_quantized(plain, tmp_path):
    """FP8, each expert a whole number of blocks: numbers and scales are stacked alike."""
    case = CASES_BY_NAME["qwen3_moe_norm"]
    case = replace(case, config=case.config | {"moe_intermediate_size": 128})
    directory = tmp_path / "hf"

    def stack(tensors: dict[str, np.ndarray]) -> None:
        scales = {key.replace("_scale_inv", ""): tensors.pop(key) for key in list(tensors) if key.endswith("_inv")}
        whole, over = stacked(tensors), stacked(scales)
        tensors.clear()
        tensors |= whole | {f"{key}_scale_inv": value for key, value in over.items()}

    values = write_quantized(case, "fp8", directory, change=stack)
    write_quantized(case, "fp8", tmp_path / "values", plain=True)
    options = {"weights_dtype": "float32"} if plain else {"weights_dtype": None}
    if plain:
        assert_same(leaves_of(directory, **options), leaves_of(tmp_path / "values"))
        convert(directory, tmp_path / "plain", to="hf", weights_dtype="float32")
        found = read_tensors(tmp_path / "plain")
        for key, value in stacked(values).items():
            np.testing.assert_array_equal(found[key], value.astype(np.float32), err_msg=key)
    else:
        write_quantized(case, "fp8", tmp_path / "one-by-one")
        assert_same(leaves_of(directory), leaves_of(tmp_path / "one-by-one"))


def test_a_stacked_tensor_of_another_shape_is_named(tiny_dir, tmp_path):
    tensors = stacked(read_tensors(tiny_dir("qwen3_moe_norm")))
    key = "model.layers.0.mlp.experts.down_proj"
    shape = list(tensors[key].shape)
    tensors[key] = np.ascontiguousarray(tensors[key].swapaxes(1, 2))
    directory = write_tensors(tiny_dir("qwen3_moe_norm"), tmp_path / "out", tensors)
    turned = [shape[0], shape[2], shape[1]]
    with pytest.raises(CheckpointError) as caught:
        leaves_of(directory)
    assert f"1 misshapen: {key} {turned} instead of {shape}" in str(caught.value)


# --- a head that config.json says is tied ---


def with_head(source: Path, directory: Path, *, other: bool, drop: tuple[str, ...] = (), **config) -> Path:
    """A tied case with a head of its own values, or of a copy of the embedding's."""
    tensors = read_tensors(source)
    head = tensors[EMBEDDING].copy()
    if other:
        head[-1, -1] += 1
    tensors[HEAD] = head
    return write_tensors(source, directory, {key: tensors[key] for key in tensors if key not in drop}, **config)


def test_a_tied_head_of_other_values_is_used(tiny_dir, tmp_path):
    directory = with_head(tiny_dir(TIED), tmp_path / "tied", other=True)
    untied = with_head(tiny_dir(TIED), tmp_path / "untied", other=True, tie_word_embeddings=False)
    llm = LLM.load(directory, mesh=mesh_of(ONE_DEVICE), dtype="float32")
    assert not llm.config.tie_word_embeddings
    assert_same(llm._runner.leaves, leaves_of(untied))
    found = [model_info(path / "config.json") for path in (directory, untied)]
    assert found[0] == found[1]
    assert found[0]["parameters"]["by_part"]["head"] == 131 * 48
    convert(directory, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    assert bytes_of(tmp_path / "hf") == bytes_of(tmp_path / "orbax") == bytes_of(directory)
    assert_same(leaves_of(tmp_path / "orbax"), leaves_of(untied))


def test_a_copy_of_the_embedding_stays_tied(tiny_dir, tmp_path):
    directory = with_head(tiny_dir(TIED), tmp_path / "out", other=False)
    assert_same(leaves_of(directory), leaves_of(tiny_dir(TIED)))
    assert "head" not in model_info(directory / "config.json")["parameters"]["by_part"]


def test_a_head_alone_is_the_tied_embedding(tiny_dir, tmp_path):
    directory = with_head(tiny_dir(TIED), tmp_path / "out", other=False, drop=(EMBEDDING,))
    assert EMBEDDING not in open_tensors(directory)
    assert_same(leaves_of(directory), leaves_of(tiny_dir(TIED)))
    assert model_info(directory / "config.json")["config_check"] == "shapes agree"
    convert(directory, tmp_path / "orbax")
    assert_same(leaves_of(tmp_path / "orbax"), leaves_of(tiny_dir(TIED)))


def test_an_untied_head_alone_lacks_the_embedding(tiny_dir, tmp_path):
    directory = with_head(tiny_dir(TIED), tmp_path / "out", other=False, drop=(EMBEDDING,), tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"1 missing: {EMBEDDING}"):
        leaves_of(directory)


def test_values_are_compared_in_slices_of_any_two_dtypes(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_COMPARED_BYTES", 64)  # four rows of float32
    value = np.arange(40, dtype=np.float32).reshape(10, 4)
    last, nan = value.copy(), value.copy()
    last[-1, -1] += 1 / 8
    nan[3, 1] = np.nan
    save_file(
        {"a": value, "b": value, "half": value.astype(ml_dtypes.bfloat16), "last": last, "nan": nan, "nan2": nan,
         "short": value[:9], "int": value.astype(np.int8)},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    tensors = open_tensors(tmp_path)
    same = {(one, other) for one in tensors for other in tensors if same_values(tensors[one], tensors[other])}
    floats = {"a", "b", "half"}
    own = {("last", "last"), ("short", "short")}
    assert same == {(one, other) for one in floats for other in floats} | own | {
        (one, other) for one in ("nan", "nan2") for other in ("nan", "nan2")
    }


# --- the dtype of files whose config.json names none ---


@pytest.mark.parametrize(("name", "dtype"), [(PLAIN, "float32"), (TIED, "bfloat16"), ("deepseek_v3_groups", None)])
def test_files_give_the_dtype_that_config_json_lacks(name, dtype, tiny_dir, tmp_path):
    source = tiny_dir(name)
    dtype = dtype or CASES_BY_NAME[name].dtype  # beside the selection bias, which is float32 in every file
    directory = write_tensors(source, tmp_path / "out", read_tensors(source), torch_dtype=None, dtype=None)
    assert not {"torch_dtype", "dtype"} & json.loads((directory / "config.json").read_text()).keys()
    assert model_info(directory / "config.json")["dtype"] == dtype
    asked = InspectRequest.of(model=str(directory), mesh="data=1", max_num_seqs=1, context=8)
    assert asked.checked_model()[0].dtype == dtype
    assert_same(leaves_of(directory, dtype=None), leaves_of(source, dtype=dtype))


def test_float16_files_run_in_float16(tiny_dir, tmp_path):
    tensors = {key: value.astype(np.float16) for key, value in read_tensors(tiny_dir(PLAIN)).items()}
    directory = write_tensors(tiny_dir(PLAIN), tmp_path / "out", tensors, torch_dtype=None)
    llm = LLM.load(directory, mesh=mesh_of(ONE_DEVICE))
    assert (llm.config.dtype, llm._runner.dtype) == ("float16", "float16")


def test_a_quantized_checkpoint_has_the_dtype_of_its_plain_tensors(tmp_path):
    """Not of its scales, float32."""
    case = CASES_BY_NAME["llama_llama3"]
    assert case.dtype == "bfloat16"
    case = replace(case, config={key: value for key, value in case.config.items() if key != "torch_dtype"})
    write_quantized(case, "fp8", tmp_path)
    assert "model.layers.0.mlp.up_proj.weight" in tensor_shapes(case)
    assert LLM.load(tmp_path, mesh=mesh_of(ONE_DEVICE))._runner.dtype == "bfloat16"


def test_a_config_alone_keeps_the_default(tiny_dir, tmp_path):
    raw = json.loads((tiny_dir(PLAIN) / "config.json").read_text())
    del raw["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert model_info(tmp_path / "config.json")["dtype"] == "bfloat16"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')  # which is not fetched yet
    asked = InspectRequest.of(model=str(tmp_path), mesh="data=1", max_num_seqs=1, context=8)
    assert asked.checked_model()[0].dtype == "bfloat16"
    index.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    assert asked.checked_model()[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 20, "truncated or not safetensors"),
        ("model.safetensors", b"\x02" + bytes(7) + b"{}", "holds no tensors"),
        ("model.safetensors.index.json", b"{", "not readable JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "outside its directory"),
        ("jaxmoe_manifest.json", b"{}", "not as jaxmoe convert wrote it"),
    ],
)  # fmt: skip
def test_damaged_weights_beside_a_config_are_refused(file, content, message, tiny_dir, tmp_path):
    raw = json.loads((tiny_dir(PLAIN) / "config.json").read_text())
    del raw["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        InspectRequest.of(model=str(tmp_path), mesh="data=1", max_num_seqs=1, context=8).checked_model()
    with pytest.raises(CheckpointError, match=message):
        PlanRequest.of(str(tmp_path), "h100").checked()

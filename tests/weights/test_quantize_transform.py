"""Checkpoints that conversion quantizes: bit for bit what quantizing on load gives, in forms that are published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.families.quantization_reader import read_quantization_config
from jaxmoe.families.quantization_writer import METHODS
from jaxmoe.quantization.formats import FORMATS, CheckpointQuantization
from jaxmoe.weights.checkpoint import open_tensors, read_json
from jaxmoe.weights.convert import convert
from jaxmoe.weights.verify import problems

from ..tiny.cases import CASES_BY_NAME
from ..tiny.checkpoint import write_checkpoint
from ..tiny.quantized import fp8, write_quantized
from .hf_checkpoints import TensorBytes, contents, write_checkpoint_dir
from .test_journal import _stop_after as stop_after
from .test_lazy_tensors import ALL, case_of, loaded

LLAMA = "llama_mha"


def plain_checkpoint(directory: Path, name: str, dtype: str = "float32", **config) -> Path:
    """A case of random values; several blocks of 128 along some matrices."""
    write_checkpoint(replace(case_of(name, **config), dtype=dtype), directory)
    return directory


def assert_same_arrays(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path].view(np.uint8), value.view(np.uint8), err_msg=path)


CASES = [
    ("qwen3_moe_sparse_step", "float32", "hf", {"hidden_size": 132, "head_dim": 52}),
    ("qwen2_moe_shared", "bfloat16", "orbax", {"hidden_size": 128, "moe_intermediate_size": 140}),
    ("deepseek_v3_groups", "bfloat16", "hf", {"q_lora_rank": 136}),
]


@pytest.mark.parametrize(("case", "dtype", "to", "config"), CASES, ids=[case for case, *_ in CASES])
@pytest.mark.parametrize("name", METHODS)
def test_a_model_holds_what_quantizing_on_load_gives(name, case, dtype, to, config, tmp_path, monkeypatch):
    """On one device and on eight; read a few rows of blocks at a time."""
    monkeypatch.setattr("jaxmoe.weights.stream._SLICE_BYTES", 10_000)
    source = plain_checkpoint(tmp_path / "plain", case, dtype, **config)
    convert(source, tmp_path / "out", to=to, weights_dtype=name, verify=True)
    for mesh in ("data=1", ALL):
        wanted, asked = loaded(source, mesh, weights_dtype=name)
        found, read = loaded(tmp_path / "out", mesh)
        assert read.quantization == asked.quantization
        assert_same_arrays(found, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_and_scales_are_those_of_the_format(name, tmp_path):
    """By definition, one matrix; and back to values."""
    source = plain_checkpoint(tmp_path / "plain", LLAMA, hidden_size=132, head_dim=32, intermediate_size=260)
    convert(source, tmp_path / "out", to="hf", weights_dtype=name)
    key = "model.layers.1.mlp.down_proj.weight"
    w = open_tensors(source)[key].read_rows(0, 132)
    if name == "fp8-block":
        (numbers, scales), value = fp8(key, w)[0].values(), fp8(key, w).value
    else:
        scales = np.abs(w).max(axis=1, keepdims=True) / np.float32(127 if name == "int8" else 448)
        numbers = np.rint(w / scales).astype(np.int8) if name == "int8" else (w / scales).astype("float8_e4m3fn")
        value = numbers.astype(np.float32) * scales
    found = open_tensors(tmp_path / "out")
    suffix = "_scale_inv" if name == "fp8-block" else "_scale"
    for tensor, wanted in ((found[key], numbers), (found[key + suffix], scales)):
        read = tensor.read_rows(0, tensor.shape[0])
        assert (read.shape, read.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(read.view(np.uint8), wanted.view(np.uint8))
    assert set(found) - set(open_tensors(source)) == {one + suffix for one in found if one + suffix in found}

    convert(tmp_path / "out", tmp_path / "values", to="hf", weights_dtype="float32", verify=True)
    back = open_tensors(tmp_path / "values")
    assert back.keys() == open_tensors(source).keys()
    assert "quantization_config" not in read_json(tmp_path / "values" / "config.json")
    np.testing.assert_array_equal(back[key].read_rows(0, 132), value)
    embedding = "model.embed_tokens.weight"
    assert back[embedding].read_rows(0, 9).tobytes() == open_tensors(source)[embedding].read_rows(0, 9).tobytes()


PLAIN = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
COMMON = {"num_bits": 8, "symmetric": True}


@pytest.mark.parametrize("name", METHODS)
def test_config_says_the_form_and_what_is_plain(name, tmp_path):
    source = plain_checkpoint(tmp_path / "plain", "qwen3_moe_norm")
    convert(source, tmp_path / "out", weights_dtype=name)
    before, config = (read_json(directory / "config.json") for directory in (source, tmp_path / "out"))
    said = config.pop("quantization_config")
    assert config == before
    plain = sorted(name for name in PLAIN if f"{name}.weight" in open_tensors(source) or name == "lm_head")
    if name == "fp8-block":
        assert said == {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": plain,
        }  # fmt: skip
    else:
        kind = {"int8": "int", "fp8": "float"}[name]
        group = {
            "targets": ["Linear"], "weights": COMMON | {"type": kind, "strategy": "channel", "dynamic": False},
            "input_activations": COMMON | {"type": kind, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }  # fmt: skip
        assert said == {
            "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "ignore": plain,
            "quantization_status": "compressed", "config_groups": {"group_0": group},
        }  # fmt: skip
    assert read_quantization_config(said) == CheckpointQuantization(
        method=METHODS[name], format=FORMATS[name], ignored=tuple(plain)
    )


def test_what_a_kill_left_is_gone_on_with(tmp_path, monkeypatch):
    """A matrix is done when its numbers and its scales are."""
    source = plain_checkpoint(tmp_path / "plain", LLAMA)
    convert(source, tmp_path / "whole", to="hf", weights_dtype="int8")
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises(CheckpointError, match=r"are saved in out.partial"):
            convert(source, tmp_path / "out", to="hf", weights_dtype="int8")
    assert convert(source, tmp_path / "out", to="hf", weights_dtype="int8").resumed_tensors == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert problems(tmp_path / "out") == []


def test_blocks_of_zeros_and_of_numbers_too_small_to_scale_are_zeros(tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    plain = open_tensors(plain_checkpoint(tmp_path / "plain", LLAMA))
    values = {name: tensor.read_rows(0, tensor.shape[0]) for name, tensor in plain.items()}
    values[key][0], values[key][1] = 0, 1e-42
    tensors: dict[str, TensorBytes] = {name: ("F32", value.shape, value.tobytes()) for name, value in values.items()}
    source = write_checkpoint_dir(tmp_path / "source", tensors, **CASES_BY_NAME[LLAMA].config)
    for name in ("int8", "fp8"):
        convert(source, tmp_path / name, weights_dtype=name)
        found = open_tensors(tmp_path / name)
        assert not found[key].read_rows(0, 2).astype(np.float32).any()
        scales = found[f"{key}_scale"].read_rows(0, 3)
        np.testing.assert_array_equal(scales > 0, [[False], [False], [True]])


def _bad(tmp_path: Path, case: str) -> Path:
    directory = tmp_path / "source"
    if case == "quantized":
        write_quantized(CASES_BY_NAME[LLAMA], "fp8", directory)
    elif case == "unknown":
        write_checkpoint_dir(directory, {"x": ("F32", (1,), bytes(4))})
    elif case == "nan":
        plain_checkpoint(directory, LLAMA)
        path = directory / "model.safetensors"
        tensor = open_tensors(directory)["model.layers.0.self_attn.o_proj.weight"]
        content = bytearray(path.read_bytes())
        content[tensor.start : tensor.start + 4] = np.float32(np.nan).tobytes()
        path.write_bytes(content)
    else:
        plain_checkpoint(directory, case)
    return directory


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        (
            LLAMA,
            "int8-block",
            "weights_dtype=int8-block has no checkpoint format .* choose one of int8, fp8, fp8-block",
        ),
        ("gpt_oss_window", "fp8", "family gpt_oss holds the matrices of all experts in one tensor"),
        ("quantized", "int8", "weights_dtype=int8 needs an unquantized checkpoint, but this one has"),
        ("unknown", "int8", "model_type 'none', which is not a supported family"),
        ("nan", "fp8-block", r"o_proj.weight' contains a number that is not finite"),
        (LLAMA, "int4", "weights_dtype='int4' must be one of float32, bfloat16, float16, int8, fp8, fp8-block"),
    ],
)
def test_what_cannot_be_is_one_line(case, name, words, tmp_path):
    source = _bad(tmp_path, case)
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        convert(source, tmp_path / "out", weights_dtype=name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()

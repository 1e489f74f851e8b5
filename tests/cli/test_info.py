"""jaxmoe info for people and as JSON: from a config alone, and from the headers of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from jaxmoe.weights.convert import convert

from .commands import jaxmoe

CONFIGS = Path(__file__).parent.parent / "families" / "configs"


def info(capsys, *arguments):
    outcome = jaxmoe(capsys, "info", *arguments, "--json")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1)
    return json.loads(outcome.out)


def test_a_config_alone_says_what_the_files_would_hold(capsys):
    found = info(capsys, CONFIGS / "deepseek-ai--DeepSeek-V3.json")
    assert (found["family"], found["layers"]) == ("deepseek_v3", {"dense": 3, "MoE": 58})
    assert found["parameters"]["total"] == 671_026_419_200
    assert found["quantization"] == {
        "method": "fp8", "supported": True, "dtype": "float8_e4m3fn", "inputs_per_scale": 128, "outputs_per_scale": 128,
    }  # fmt: skip
    experts = 58 * 256 * 3
    assert found["bytes"]["by_part"]["experts"] == experts * (7168 * 2048 + 56 * 16 * 4)
    assert found["kv_bytes_per_token"] == 61 * 576 * 2
    assert found["attention"]["key_value_latent"] == 512
    assert found["experts"]["groups_per_token"] == 4
    assert not found["bytes"]["measured"]


def test_kinds_of_layers_are_counted(capsys):
    found = info(capsys, CONFIGS / "meta-llama--Llama-4-Maverick-17B-128E-Instruct.json")
    assert found["layers"] == {
        "dense, chunks of 8192": 24, "MoE, chunks of 8192": 12, "MoE, no rotary embedding": 12
    }  # fmt: skip
    assert info(capsys, CONFIGS / "openai--gpt-oss-20b.json")["layers"] == {"MoE, window of 128": 12, "MoE": 12}


def test_pages_behind_windows_are_kept_where_some_layer_sees_all(capsys):
    found = info(capsys, CONFIGS / "openai--gpt-oss-20b.json")
    assert found["behind_windows"] == {
        "tokens": 131072, "layers": 12, "of_layers": 24, "freed": False, "held_tokens": 131072,
        "kept_bytes": 12 * (131072 - 128) * 8 * 64 * 2 * 2,
    }  # fmt: skip
    said = jaxmoe(capsys, "info", CONFIGS / "openai--gpt-oss-20b.json").out
    assert (
        "Pages outside attention windows of 12 of 24 layers are not freed: 3,069.0 MiB for a request of 131,072 tokens."
    ) in said
    assert info(capsys, CONFIGS / "deepseek-ai--DeepSeek-V3.json")["behind_windows"] is None


def test_pages_behind_windows_are_freed_where_every_layer_has_one(capsys, tiny_dir, tmp_path):
    found = info(capsys, tiny_dir("mistral_window"))  # of 9 tokens, in a context of 128
    assert found["behind_windows"]["freed"]
    assert found["behind_windows"]["held_tokens"] == 128
    raw = json.loads((tiny_dir("mistral_window") / "config.json").read_text(encoding="utf-8"))
    (config := tmp_path / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 32768}))
    said = jaxmoe(capsys, "info", config).out
    assert "Pages outside attention windows are freed: a request of 32,768 tokens holds at most 521 at once." in said


@pytest.mark.parametrize("name", ["deepseek_v3_groups", "gpt_oss_window", "llama_llama3"])
def test_bytes_are_those_of_the_files_where_there_are_any(name, capsys, tiny_dir, tmp_path):
    found = info(capsys, tiny_dir(name))
    num_bytes = 0
    for path in tiny_dir(name).glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            num_bytes += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert found["bytes"]["measured"]
    assert found["bytes"]["total"] == sum(found["bytes"]["by_part"].values()) == num_bytes
    shutil.copy(tiny_dir(name) / "config.json", tmp_path)
    assert info(capsys, tmp_path)["bytes"] == found["bytes"] | {"measured": False}


def test_a_format_that_cannot_be_read_is_named_and_the_rest_is_said(capsys, tmp_path):
    raw = json.loads((CONFIGS / "Qwen--Qwen3-30B-A3B.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    found = info(capsys, tmp_path)
    assert found["quantization"] == {"method": "gptq", "supported": False}
    assert found["bytes"]["total"] is None
    assert found["parameters"]["total"] == 30_532_122_624
    outcome = jaxmoe(capsys, "info", tmp_path)
    assert (outcome.code, "quantized by gptq, which jaxmoe does not read" in outcome.out) == (0, True)


def test_a_setting_that_is_not_understood_is_named_and_the_rest_is_said(capsys, tmp_path):
    raw = json.loads((CONFIGS / "Qwen--Qwen3-30B-A3B.json").read_text(encoding="utf-8"))
    odd = {"attn_gate": 2, "architectures": ["Qwen3MoeModel"], "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    odd |= {"partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(raw | odd))
    found = info(capsys, tmp_path)
    named = [
        "partial_rotary_factor = 0.5",
        "rope_scaling = 'dynamic'",
        "architectures = ['Qwen3MoeModel']",
        "attn_gate = 2",
    ]
    assert found["not_understood"] == named
    assert found["parameters"]["total"] == 30_532_122_624
    assert found["parameters"]["active"] - found["parameters"]["active_without_embedding"] == 151936 * 2048
    outcome = jaxmoe(capsys, "info", tmp_path)
    assert outcome.code == 0
    assert [line for line in outcome.out.splitlines() if line.startswith("not understood")] == [
        f"not understood: {note}" for note in named
    ]
    refused = jaxmoe(capsys, "compile", tmp_path, "--target", "b200:1x8", "--mesh", "expert=8")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "instead of Qwen3MoeForCausalLM" in refused.err


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    ],
)
def test_a_format_without_a_name_is_that_of_its_producer(settings, method, capsys, tmp_path):
    raw = json.loads((CONFIGS / "Qwen--Qwen3-30B-A3B.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw | settings))
    assert info(capsys, tmp_path)["quantization"] == {"method": method, "supported": False}


def test_people_see_a_table(capsys):
    outcome = jaxmoe(capsys, "info", CONFIGS / "openai--gpt-oss-120b.json")
    assert outcome.code == 0
    for words in (
        "116,829,156,672",
        "5,711,982,912",
        "5,132,849,472",
        "60.8 GiB",
        "18 MoE, window of 128; 18 MoE",
        "mxfp4",
    ):
        assert words in outcome.out


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_a_converted_checkpoint_is_measured_too(form, capsys, tiny_dir, tmp_path):
    convert(tiny_dir("deepseek_v3_groups"), tmp_path / "out", to=form)
    assert info(capsys, tmp_path / "out") == info(capsys, tiny_dir("deepseek_v3_groups"))


def test_weights_are_held_against_the_config(capsys, tiny_dir, tmp_path):
    assert info(capsys, tiny_dir("llama_llama3"))["config_check"] == "shapes agree"
    shutil.copytree(tiny_dir("llama_llama3"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 98}))
    words = "1 misshapen: model.embed_tokens.weight"
    assert words in info(capsys, tmp_path / "model")["config_check"]
    outcome = jaxmoe(capsys, "info", tmp_path / "model")
    assert (outcome.code, words in outcome.out) == (0, True)
    assert info(capsys, CONFIGS / "openai--gpt-oss-20b.json")["config_check"] is None


def test_weights_that_are_none(capsys, tiny_dir, tmp_path):
    shutil.copy(tiny_dir("llama_llama3") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    outcome = jaxmoe(capsys, "info", tmp_path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "holds no tensors" in outcome.err


def test_a_local_model_has_no_revisions(capsys):
    outcome = jaxmoe(capsys, "info", "demo", "--revision", "main")
    assert (outcome.code, "only hub models have revisions" in outcome.err) == (2, True)


@pytest.mark.parametrize("model", ["no/such/folder", "none/config.json", "README.md"])
def test_what_is_no_model_is_one_line(model, capsys):
    outcome = jaxmoe(capsys, "info", model)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_what_nvidia_publishes_is_sized_though_not_run(capsys, tmp_path):
    """NVIDIA says how matrices are quantized in a file beside config.json."""
    raw = json.loads((CONFIGS / "nvidia--DeepSeek-V3.1-NVFP4.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    plain = info(capsys, tmp_path)
    excluded = ["lm_head", "model.layers.*.self_attn*", "model.layers.*.mlp.gate"]
    how = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(how))
    found = info(capsys, tmp_path)
    assert found["quantization"] == {
        "method": "modelopt", "supported": False, "dtype": "nvfp4", "inputs_per_scale": 16, "outputs_per_scale": 1,
    }  # fmt: skip
    assert found["bytes"]["by_part"]["experts"] == plain["bytes"]["by_part"]["experts"] * (4 + 8 / 16) / 16
    assert found["bytes"]["by_part"]["attention"] == plain["bytes"]["by_part"]["attention"]
    assert info(capsys, "deepseek-v3.1-nvfp4")["bytes"] == found["bytes"]
    refused = jaxmoe(capsys, "compile", tmp_path, "--target", "b200:1x8", "--mesh", "expert=8")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "quant_method 'modelopt', which can be sized and planned" in refused.err

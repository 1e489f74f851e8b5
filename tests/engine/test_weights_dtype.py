"""Models whose matrices are kept quantized: logits of dequantized ones, on every kind of mesh, and their traffic."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.aot.request import InspectRequest
from jaxmoe.errors import ConfigError
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.ops.quantized_matmul import tiles
from jaxmoe.report.parameters import parameter_reports, total_bytes

from ..conftest import XLA, mesh_of
from ..parallel.test_layouts import assert_planned
from ..report.test_parameters import reports_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.quantized import FORMS, write_quantized

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1]]
ALL = "data=2,tensor=2,expert=2"


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch, few_block_sizes):
    """Several tiles of small matrices, and few sizes of blocks."""
    monkeypatch.setattr(tiles, "_TILE_BYTES", 1 << 14)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """form -> a checkpoint of four layers in that form."""
    root = tmp_path_factory.mktemp("quantized")

    def write(form: str, name: str, **keys):
        directory = root / f"{form}-{name}"
        if not directory.exists():
            case = CASES_BY_NAME[name]
            case = replace(case, dtype="float32", config=case.config | {"num_hidden_layers": 4} | keys)
            write_quantized(case, form, directory)
        return directory

    return write


FP8 = ("fp8", "qwen2_moe_shared")
MXFP4 = ("mxfp4", "mixtral_six_experts")
KEYS = {"mxfp4": {"hidden_size": 96, "intermediate_size": 160}}
GPT_OSS = ("mxfp4", "gpt_oss_window")
DEEPSEEK = ("fp8", "deepseek_v3_groups")


@pytest.mark.parametrize(
    ("form", "mesh", "layout"),
    [
        (FP8, ALL, "ep-tp"),
        (GPT_OSS, "tensor=2,expert=2", "ep-tp"),
        pytest.param(GPT_OSS, "data=2,pipeline=2,tensor=2", "tp-sp", marks=pytest.mark.sweep),
        pytest.param(DEEPSEEK, ALL, "tp-ep", marks=pytest.mark.sweep),
        pytest.param(DEEPSEEK, "data=2,tensor=2", "cp-ep-tp", marks=pytest.mark.sweep),
        pytest.param(("int8-channel", "llama_mha"), "pipeline=2,tensor=4", "tp-sp", marks=pytest.mark.sweep),
        pytest.param(MXFP4, "pipeline=2,tensor=4", "tp-sp", marks=pytest.mark.sweep),
        pytest.param(MXFP4, ALL, "tp-ep", marks=pytest.mark.sweep),
        pytest.param(FP8, "pipeline=2,tensor=2,expert=2", "dp-ep", marks=pytest.mark.sweep),
        pytest.param(("int8-channel", "qwen3_moe_norm"), ALL, "cp-ep-tp", marks=pytest.mark.sweep),
        pytest.param(("fp8-channel", "llama_llama3"), "tensor=8", "ep-tp", marks=pytest.mark.sweep),
    ],
)
def test_kept_matrices_give_the_logits_of_dequantized_ones_and_say_what_was_planned(form, mesh, layout, written):
    directory = written(*form, **KEYS.get(form[0], {}))
    plain = LLM.load(directory, mesh=mesh_of("data=1"), weights_dtype="float32", kernels=XLA)
    assert plain._runner.dtype == "float32"
    wanted = plain.last_logits(PROMPTS)
    kept = LLM.load(directory, mesh=mesh_of(mesh), layout=layout, dtype="float32", kernels=XLA)
    assert kept.config.quantization is not None
    np.testing.assert_allclose(kept.last_logits(PROMPTS), wanted, atol=1e-5 * np.abs(wanted).max())
    assert_planned(kept, rows=8, blocks=1)


def test_bfloat16_activations_err_as_with_plain_weights_and_generate(written):
    directory = written("fp8-channel", "llama_llama3")
    exact = LLM.load(directory, mesh=mesh_of("data=1"), weights_dtype="float32").last_logits(PROMPTS)
    kept = LLM.load(directory, mesh=mesh_of("data=1"), dtype="bfloat16")
    plain = LLM.load(directory, mesh=mesh_of("data=1"), weights_dtype="bfloat16")
    assert plain._runner.dtype == "bfloat16"
    errors = [np.linalg.norm(llm.last_logits(PROMPTS) - exact) / np.linalg.norm(exact) for llm in (kept, plain)]
    assert errors[0] < 1.5 * errors[1]  # which is that of activations
    assert kept.generate(PROMPTS[:1])[0].token_ids


@pytest.mark.parametrize(("name", "error"), [("int8-block", 0.03), ("fp8", 0.1)])
def test_plain_checkpoints_are_quantized_on_load(name, error, tiny_dir):
    directory = tiny_dir("llama_mha")
    wanted = LLM.load(directory, mesh=mesh_of("data=1")).last_logits(PROMPTS)
    found = LLM.load(directory, mesh=mesh_of("tensor=2"), weights_dtype=name).last_logits(PROMPTS)
    assert 0 < np.linalg.norm(found - wanted) < error * np.linalg.norm(wanted)


def test_native_kernels_that_were_asked_for_are_refused(written):
    for step, form in (("grouped", MXFP4), ("linear", FP8)):
        directory = written(*form, **KEYS.get(form[0], {}))
        with pytest.raises(ConfigError, match=f"{step}=native reads plain weights.*--weights-dtype"):
            LLM.load(directory, mesh=mesh_of("data=1"), kernels={step: "native"})
    assert isinstance(LLM.load(directory, mesh=mesh_of("data=1"))._runner.kernels, KernelConfig)


def test_plain_weights_have_the_dtype_of_activations(tiny_dir):
    with pytest.raises(ConfigError, match="weights_dtype=bfloat16 and dtype=float32 differ"):
        LLM.load(tiny_dir("llama_mha"), mesh=mesh_of("data=1"), weights_dtype="bfloat16", dtype="float32")


def test_bytes_that_are_told_are_those_of_the_arrays(written):
    directory = written(*MXFP4, **KEYS["mxfp4"])
    llm = LLM.load(directory, mesh=mesh_of(ALL), dtype="float32")
    found = reports_of(llm, directory, ALL)
    for one, leaf in zip(found, llm._runner.leaves, strict=True):
        assert (one.shape, one.dtype) == (leaf.shape, leaf.dtype.name)
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {one.bytes.device}
        assert one.bytes.model + one.bytes.padding + one.bytes.head_copies == leaf.nbytes


GEOMETRY = dict(vocab_size=512, hidden_size=2048, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
                head_dim=64)  # fmt: skip
EXPERTS = {"mixtral_six_experts": {"num_local_experts": 16, "intermediate_size": 768},
           "qwen3_moe_norm": {"num_experts": 16, "moe_intermediate_size": 768}}  # fmt: skip


@pytest.mark.parametrize("mesh", ["data=1", "expert=4,tensor=2", "tensor=8"])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_device_holds_what_the_file_does(form, mesh, tmp_path):
    """Within 3%, of real widths: all devices together, each array once; also as told before anything is read."""
    name = "mixtral_six_experts" if form == "mxfp4" else "qwen3_moe_norm"
    config = CASES_BY_NAME[name].config | GEOMETRY | EXPERTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FORMS[form][1]}))
    question = InspectRequest.of(model=str(tmp_path), mesh=mesh, max_num_seqs=8, context=32)
    read, _ = question.checked_model()
    runner = question.runner(read, mesh_of(mesh), XLA)
    held = total_bytes(parameter_reports(runner))
    matrix = lambda outputs, inputs: outputs * inputs + _scales(form, outputs, inputs)  # noqa: E731
    width, heads, keys, ffn = 2048, 16 * 64, 8 * 64, 768
    shapes = [(heads, width), (keys, width), (keys, width), (width, heads)]
    attention = sum(outputs * inputs * 2 if form == "mxfp4" else matrix(outputs, inputs) for outputs, inputs in shapes)
    experts = 16 * sum(
        outputs * inputs // 2 + outputs * inputs // 32 if form == "mxfp4" else matrix(outputs, inputs)
        for outputs, inputs in [(ffn, width), (ffn, width), (width, ffn)]
    )
    norms = 2 * width + (0 if form == "mxfp4" else 2 * 64)
    file_bytes = 2 * (attention + experts + 2 * (16 * width + norms)) + 2 * (2 * 512 * width + width)
    assert abs(held.model + held.padding - file_bytes) < 0.03 * file_bytes


def _scales(form: str, outputs: int, inputs: int) -> int:
    return -(-outputs // 128) * -(-inputs // 128) * 4 if form == "fp8" else outputs * 2

"""Every case on one device and a mesh of 8, against transformers run here and now on the same file; that the goldens
are what transformers says makes tests of those, on every mesh, tests of this too."""

from __future__ import annotations

from functools import cache

import pytest

from jaxmoe import LLM

from ..agreement import LOGIT_TOLERANCE, assert_agrees
from ..conftest import ONE_DEVICE, mesh_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.golden import Reference, load_golden
from ..tiny.stacked import read_tensors, stacked, write_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


@cache
def live(name: str, directory) -> Reference:
    from ..tiny.oracle import reference

    return reference(CASES_BY_NAME[name], directory)


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_the_golden_is_what_transformers_says(name, tiny_dir):
    now, golden = live(name, tiny_dir(name)), load_golden(CASES_BY_NAME[name])
    assert abs(now.last_logits - golden.last_logits).max() <= 1e-4
    assert now.greedy.tolist() == golden.greedy.tolist()


@pytest.mark.parametrize("mesh", [ONE_DEVICE, "data=2,tensor=2,expert=2"])
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_agrees_with_transformers(name, mesh, tiny_dir, tiny_llm):
    assert_agrees(tiny_llm(name, mesh), CASES_BY_NAME[name], live(name, tiny_dir(name)))


# One of every family whose experts are published one by one.
EXPERTS = ("mixtral_window", "qwen2_moe_shared", "qwen3_moe_norm", "olmoe_clip_qkv", "deepseek_v2_lite",
           "deepseek_v3_groups", "kimi_k2_one_group", "glm4_moe_groups")  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_what_transformers_saves_with_stacked_experts_is_read(name, tiny_dir, tmp_path):
    from ..tiny.oracle import load_model

    load_model(tiny_dir(name)).save_pretrained(tmp_path, save_original_format=False)
    (tmp_path / "config.json").write_bytes((tiny_dir(name) / "config.json").read_bytes())
    case, found = CASES_BY_NAME[name], read_tensors(tmp_path)
    wanted = stacked(read_tensors(tiny_dir(name)))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in found)
    llm = LLM.load(tmp_path, mesh=mesh_of(ONE_DEVICE), dtype="float32")
    assert_agrees(llm, case, live(name, tiny_dir(name)))


@pytest.mark.parametrize("drop", [(), ("model.embed_tokens.weight",)])
def test_a_tied_head_is_used_as_transformers_does(drop, tiny_dir, tmp_path):
    """One of other values than the embedding; and one that stands alone, which is the embedding."""
    import torch

    from ..tiny.oracle import load_model

    tensors = read_tensors(tiny_dir("qwen2_tied"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    write_tensors(tiny_dir("qwen2_tied"), tmp_path, {key: tensors[key] for key in tensors if key not in drop})
    prompt = [3, 1, 4, 1, 5, 9]
    wanted = load_model(tmp_path)(input_ids=torch.tensor([prompt])).logits[0, -1].detach().numpy()
    found = LLM.load(tmp_path, mesh=mesh_of(ONE_DEVICE), dtype="float32").last_logits([prompt])[0]
    assert abs(found - wanted).max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["llama_mha", "llama_llama3"])
def test_files_give_the_dtype_as_in_transformers(name, tiny_dir, tmp_path):
    import transformers

    tensors = read_tensors(tiny_dir(name))
    write_tensors(tiny_dir(name), tmp_path, tensors, torch_dtype=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    llm = LLM.load(tmp_path, mesh=mesh_of(ONE_DEVICE))
    assert str(model.dtype).removeprefix("torch.") == llm._runner.dtype == CASES_BY_NAME[name].dtype

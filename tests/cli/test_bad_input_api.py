"""The same mistakes through the Python API: each raises its documented exception, which is a ValueError."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmoe import LLM, CheckpointError, ConfigError, JaxmoeError, MeshError, RequestError, SamplingParams

from ..conftest import ONE_DEVICE

CASE = "llama_mha"  # 97 ids, a context of 128 tokens, no tokenizer


@pytest.fixture
def llm(tiny_llm) -> LLM:
    return tiny_llm(CASE, ONE_DEVICE)


def test_every_documented_exception_is_a_value_error():
    for kind in (CheckpointError, ConfigError, MeshError, RequestError):
        assert issubclass(kind, JaxmoeError)
        assert issubclass(kind, ValueError)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("data=9", "data=9 .* needs 9 devices and there are 8"),
        ({"data": 9}, "needs 9 devices and there are 8"),
        ({"model": 8}, "unknown mesh axis 'model'; the axes are data, tensor, pipeline, expert"),
        ({"data": 0}, "mesh axis data=0 must be a whole number of at least 1"),
        ({"data": True}, "mesh axis data=True must be a whole number"),
        ({"data": 2.0}, "mesh axis data=2.0 must be a whole number"),
        ("data=2,data=4", "names axis 'data' twice"),
        ("nowhere", "'nowhere' is neither axes .* presets: "),
    ],
)
def test_a_mesh_that_cannot_be(tiny_dir, mesh, words):
    with pytest.raises(MeshError, match=words):
        LLM.load(tiny_dir(CASE), mesh=mesh)


def test_a_jax_mesh_with_another_axis(tiny_dir):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(MeshError, match="unknown mesh axis 'model'"):
        LLM.load(tiny_dir(CASE), mesh=mesh)


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf61"])
def test_a_dtype_that_is_none(tiny_dir, dtype):
    with pytest.raises(ConfigError, match=f"dtype='{dtype}' must be one of float32, bfloat16, float16"):
        LLM.load(tiny_dir(CASE), mesh="data=8", dtype=dtype)


@pytest.mark.parametrize("max_num_seqs", [0, -1, 1.5, "8", True])
def test_a_batch_that_cannot_be(tiny_dir, max_num_seqs):
    with pytest.raises(ConfigError, match=f"max_num_seqs={max_num_seqs!r} must be a whole number of at least 1"):
        LLM.load(tiny_dir(CASE), mesh="data=8", max_num_seqs=max_num_seqs)


@pytest.mark.parametrize("model", ["/no/such/place", "", "two words", Path("no/such")])
def test_a_model_that_is_nowhere(model):
    with pytest.raises(CheckpointError, match=r"is not an existing directory, a preset .* or a hub id"):
        LLM.load(model)


def test_a_damaged_checkpoint(tiny_dir, tmp_path):
    damaged = shutil.copytree(tiny_dir(CASE), tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors.*fetch it again"):
        LLM.load(damaged)
    (damaged / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type 'gpt2'"):
        LLM.load(damaged)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt 0 is empty"),
        ([97], r"token id 97 at position 0; ids must be whole numbers in \[0, 97\)"),
        ([1, -1], "token id -1 at position 1"),
        ([1, 2.0], "token id 2.0 at position 1"),
        ([True], "token id True"),
        ([None], "token id None"),
        ([[1]], r"token id \[1\]"),
        (5, "prompt 0 is '5', token ids must be a list"),
        (None, "prompt 0 is 'None', token ids must be a list"),
        (b"ab", "token ids must be a list"),
        ({1: 2}, "token ids must be a list"),
    ],
)
def test_token_ids_that_cannot_be(llm, prompt, words):
    for call in (llm.generate, llm.stream, llm.score, llm.last_logits):
        with pytest.raises(RequestError, match=words):
            call([prompt])


def test_prompts_that_are_too_long(llm):
    with pytest.raises(RequestError, match="prompt 1 has 128 tokens, the model's context holds 127: shorten it"):
        llm.generate([[1], [1] * 128])
    with pytest.raises(RequestError, match="prompt 0 has 129 tokens, the model's context holds 128: shorten it"):
        llm.score([[1] * 129])


def test_no_prompts_or_no_tokenizer(llm):
    with pytest.raises(RequestError, match="no prompts were given"):
        llm.generate([])
    with pytest.raises(RequestError, match=r"no tokenizer.json: give token ids"):
        llm.generate(["text"])
    with pytest.raises(RequestError, match="prompts must be a list"):
        llm.generate("text")
    with pytest.raises(RequestError, match=r"no tokenizer.json"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match=r"stop strings need a tokenizer.json"):
        llm.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="2 SamplingParams for 1 prompts"):
        llm.generate([[1]], [SamplingParams()] * 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 1.0}, "max_tokens=1.0 must be a whole number"),
        ({"max_tokens": True}, "max_tokens=True must be a whole number"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": 101}, "temperature=101 must be 0"),
        ({"top_k": -2}, "top_k=-2 must lie in"),
        ({"top_k": 2**31}, "top_k=2147483648 must lie in"),
        ({"top_p": 0}, r"top_p=0 must lie in \(0, 1\]"),
        ({"min_p": 1.1}, r"min_p=1.1 must lie in \[0, 1\]"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809 must lie in"),
        ({"seed": 2**64}, "seed=18446744073709551616 must lie in"),
        ({"stop": ["a", ""]}, "must be non-empty strings"),
        ({"stop": [1]}, "must be non-empty strings"),
        ({"stop": 5}, "stop=5 must be non-empty strings"),
        ({"temperature": 10**400}, "temperature=10+ must be a finite"),
    ],
)
def test_sampling_values_that_cannot_be(values, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**values)


def test_ids_may_be_any_whole_numbers(llm):
    as_list, as_tuple, as_array = llm.score([[1, 2, 3], (1, 2, 3), np.array([1, 2, 3])])
    np.testing.assert_array_equal(as_list, as_tuple)
    np.testing.assert_array_equal(as_list, as_array)

"""SmolLM2-135M-Instruct, converted from a published GGUF file, against transformers reading that file by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jaxmoe import LLM, SamplingParams
from jaxmoe.text.tokenizer import CheckpointTokenizer
from jaxmoe.weights.checkpoint import read_json
from scripts.gguf_to_hf import convert, packaged_model
from scripts.real_model import CHAT, NUM_TOKENS, PLAIN, Oracle

from ..conftest import ONE_DEVICE, mesh_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parent.parent.parent
TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)  # 3.14159, 0x1F\n",
    "It's 2026, isn't it? They'll say: \"we'd better go.\"",
    "Größe, naïve, 東京, привет, 🙂🚀",
    "  leading spaces\tand\ttabs   \n\n\nand lines",
    "<|im_start|>user\nspecial <|im_end|> tokens <|endoftext|>",
    "<file_sep><repo_name>jaxmoe<|im_end",
)


@pytest.fixture(scope="module")
def directory():
    return convert(ROOT / ".cache" / "smollm2-135m-instruct")


@pytest.fixture(scope="module")
def oracle(directory):
    return Oracle.load(packaged_model(), directory)


def test_every_tensor_is_the_one_transformers_reads(oracle, directory):
    with safe_open(directory / "model.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(oracle.tensors)
        for name, tensor in oracle.tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor.numpy(), err_msg=name)


def test_texts_have_the_ids_transformers_gives_them(oracle, directory):
    tokenizer = CheckpointTokenizer.load(directory, read_json(directory / "tokenizer_config.json"))
    assert [tokenizer.encode(text) for text in TEXTS] == [oracle.ids(text) for text in TEXTS]
    for text in TEXTS:
        ids = oracle.ids(text)
        assert tokenizer.decode(ids) == oracle.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, "data=2,tensor=2,pipeline=2"])
def test_greedy_tokens_of_a_plain_and_a_chat_prompt(mesh, directory, oracle):
    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="float32")
    prompts = {"plain": llm.tokenizer.encode(PLAIN), "chat": llm.chat_prompt([{"role": "user", "content": CHAT}])}
    assert prompts == oracle.prompts()
    outputs = llm.generate(list(prompts.values()), SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    assert [oracle.difference(out.prompt_token_ids, out.token_ids) for out in outputs] == [None, None]


def test_spaces_before_a_digit_are_split_as_published(directory):
    """transformers 5.24 does not know the pre-tokenizer that the file names, which takes each digit by itself first."""
    tokenizer = CheckpointTokenizer.load(directory, {})
    assert [tokenizer.decode([token]) for token in tokenizer.encode("x =  12")] == ["x", " =", "  ", "1", "2"]

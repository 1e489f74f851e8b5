"""SmolLM2-135M-Instruct, converted from a published GGUF file, against transformers reading that file by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jaxmoe import LLM, SamplingParams

from ..conftest import ONE_DEVICE, mesh_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parent.parent.parent
MIN_LOGIT_GAP = 1e-3  # far above what sums in another order move a logit by
TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)  # 3.14159, 0x1F\n",
    "It's 2026, isn't it? They'll say: \"we'd better go.\"",
    "Größe, naïve, 東京, привет, 🙂🚀",
    "  leading spaces\tand\ttabs   \n\n\nand lines",
    "<|im_start|>user\nspecial <|im_end|> tokens <|endoftext|>",
    "<file_sep><repo_name>jaxmoe<|im_end",
)


@pytest.fixture(scope="module")
def oracle():
    from scripts.gguf_to_hf import packaged_model
    from scripts.real_model import Oracle

    return Oracle.load(packaged_model())


@pytest.fixture(scope="module")
def directory():
    from scripts.gguf_to_hf import convert

    return convert(ROOT / ".cache" / "smollm2-135m-instruct")


@pytest.fixture(scope="module")
def expected(oracle):
    """Name of a prompt -> its ids and the tokens that follow."""
    found = {}
    for name, prompt in oracle.prompts().items():
        tokens, gap = oracle.greedy(prompt)
        assert gap > MIN_LOGIT_GAP, f"{name}: another prompt is needed"
        found[name] = prompt, tokens
    return found


def test_every_tensor_is_the_one_transformers_reads(oracle, directory):
    read = {name: tensor.numpy() for name, tensor in oracle.model.named_parameters()}
    with safe_open(directory / "model.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(read)
        for name in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(name), read[name], err_msg=name)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, "data=2,tensor=2,pipeline=2"])
def test_greedy_tokens_of_a_plain_and_a_chat_prompt(mesh, directory, oracle, expected):
    from scripts.real_model import CHAT, PLAIN

    llm = LLM.load(directory, mesh=mesh_of(mesh), dtype="float32")
    prompts = llm.tokenizer.encode(PLAIN), llm.chat_prompt([{"role": "user", "content": CHAT}])
    assert prompts == (expected["plain"][0], expected["chat"][0])
    if mesh == ONE_DEVICE:
        for text in TEXTS:
            assert llm.tokenizer.encode(text) == oracle.ids(text), text
            assert llm.tokenizer.decode(oracle.ids(text)) == oracle.tokenizer.decode(
                oracle.ids(text), skip_special_tokens=True
            )
    outputs = llm.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    assert [out.token_ids for out in outputs] == [expected["plain"][1], expected["chat"][1]]


def test_spaces_before_a_digit_are_split_as_published(directory):
    """transformers 5.24 does not know the pre-tokenizer that the file names, which takes each digit by itself first."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("x =  12").tokens == ["x", "Ġ=", "ĠĠ", "1", "2"]

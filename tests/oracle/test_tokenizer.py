"""Added tokens and chat templates against transformers, which reads the same files."""

from __future__ import annotations

import json
import random

import pytest

from jaxmoe.text.tokenizer import CheckpointTokenizer

from ..text.test_added_tokens import CASES, checkpoint, load, token
from ..text.test_chat import RENDERED, TOKENS, USER

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]
TEXTS = ["<a>", "</s>", "<b>", "<c>", "bc", "d_", "a", " ", "|", "e"]
NAMES = ["bos_token", "eos_token", "pad_token", "cls_token", "image_token"]


def theirs(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def agrees(tokenizer: CheckpointTokenizer, directory, rng: random.Random) -> None:
    reference = theirs(directory)
    assert tokenizer._added.variables().items() >= reference.special_tokens_map.items()
    for _ in range(6):
        text = "".join(rng.choice(TEXTS) for _ in range(rng.randrange(1, 9)))
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("files", [case[0] for case in CASES.values()], ids=CASES)
def test_added_tokens_are_those_of_transformers(files, tmp_path):
    agrees(load(tmp_path, **files), tmp_path, random.Random(0))


def drawn_token(rng: random.Random) -> object:
    content = rng.choice(["</s>", "<b>", "<c>", "d_", "bc", "<a>"])
    flags = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return content if rng.random() < 0.6 else {"__type": "AddedToken"} | token(content, **flags)


@pytest.mark.parametrize("seed", range(150))
def test_drawn_files_give_the_tokens_of_transformers(seed, tmp_path):
    rng = random.Random(seed)
    config = {name: drawn_token(rng) for name in rng.sample(NAMES, rng.randrange(4))}
    kind = rng.choice(["extra_special_tokens", "additional_special_tokens"])
    if rng.random() < 0.5:
        config[kind] = [one for one in (drawn_token(rng) for _ in range(2)) if isinstance(one, str)]
    files = {"tokenizer_config": config}
    if rng.random() < 0.4:
        contents = rng.sample(["<b>", "<c>", "d_", "bc", "</s>"], 2)
        flags = [{flag: rng.random() < 0.3 for flag in token("")} | {"content": content} for content in contents]
        config["added_tokens_decoder"] = {str(13 + at): value for at, value in enumerate(flags)}
    elif rng.random() < 0.5:
        files["added_tokens"] = {content: 13 + at for at, content in enumerate(rng.sample(["<b>", "<c>", "bc"], 2))}
    if rng.random() < 0.5:
        drawn = {name: drawn_token(rng) for name in rng.sample(NAMES[:4], 2)}
        files["special_tokens_map"] = {
            name: value if isinstance(value, str) else {k: v for k, v in value.items() if k != "__type"}
            for name, value in drawn.items()
        }
    agrees(load(tmp_path, **files), tmp_path, rng)


@pytest.mark.parametrize("template", [case[0] for case in RENDERED.values()], ids=RENDERED)
def test_templates_render_as_in_transformers(template, tmp_path):
    checkpoint(tmp_path, tokenizer_config=TOKENS | {"chat_template": template})
    ours = CheckpointTokenizer.load(tmp_path, json.loads((tmp_path / "tokenizer_config.json").read_text()))
    expected = theirs(tmp_path).apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert ours is not None
    assert ours.chat(USER) == expected

"""Tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json add; end tokens from every file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HFTokenizer

from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.text.added_tokens import added_tokens
from jaxmoe.text.eos import eos_ids, special_stop_ids
from jaxmoe.text.tokenizer import CheckpointTokenizer

VOCAB = "abcde<>|/s _"  # ids 0 to 11; the next token gets 12
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def token(content: str, **flags: bool) -> dict[str, object]:
    defaults = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **defaults, **flags}


def checkpoint(directory: Path, **files: object) -> Path:
    """A tokenizer of single letters with <a> added (id 12), and other files by their names without .json."""
    tokenizer = HFTokenizer(models.BPE({letter: at for at, letter in enumerate(VOCAB)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<a>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in ({"config": {}} | files).items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def load(directory: Path, **files: object) -> CheckpointTokenizer:
    checkpoint(directory, **files)
    path = directory / CONFIG
    loaded = CheckpointTokenizer.load(directory, json.loads(path.read_text()) if path.exists() else {})
    assert loaded is not None
    return loaded


# files, a text, its ids, and the text of those (transformers' answers; tests/oracle compares at random)
CASES = {
    "eos_token": ({"tokenizer_config": {"eos_token": "</s>"}}, "a</s>", [0, 13], "a"),
    "an object": ({"tokenizer_config": {"pad_token": {"__type": "AddedToken", **token("<b>")}}}, "a<b>", [0, 13], "a"),
    "a model's own name": ({"tokenizer_config": {"image_token": "<b>"}}, "a<b>", [0, 13], "a"),
    "extra_special_tokens": ({"tokenizer_config": {"extra_special_tokens": ["<b>", "<c>"]}}, "<c>a", [14, 0], "a"),
    "extra, named": ({"tokenizer_config": {"extra_special_tokens": {"x_token": "<b>"}}}, "<b>a", [13, 0], "a"),
    "additional_special_tokens": ({"tokenizer_config": {"additional_special_tokens": ["<b>"]}}, "a<b>", [0, 13], "a"),
    "added_tokens_decoder": (
        {"tokenizer_config": {"added_tokens_decoder": {"14": token("<c>"), "13": token("<b>", special=False)}}},
        "<b><c>", [13, 14], "<b>",
    ),
    "flags": (
        {"tokenizer_config": {"added_tokens_decoder": {"13": token("<b>", lstrip=True, rstrip=True)}}},
        "a <b> c", [0, 13, 2], "ac",
    ),
    "a single word": (
        {"tokenizer_config": {"added_tokens_decoder": {"13": token("bc", single_word=True, special=False)}}},
        "bc abc", [13, 10, 0, 1, 2], "bc abc",
    ),
    "an end token that its list calls plain": (
        {"tokenizer_config": {"eos_token": "<b>", "added_tokens_decoder": {"13": token("<b>", special=False)}}},
        "a<b>", [0, 13], "a",
    ),
    "special_tokens_map": ({"special_tokens_map": {"eos_token": token("</s>")}}, "a</s>", [0, 13], "a"),
    "special_tokens_map, before the config": (
        {"tokenizer_config": {"eos_token": "<b>"}, "special_tokens_map": {"eos_token": "<c>"}}, "<b><c>",
        [5, 1, 6, 13], "<b>",
    ),
    "special_tokens_map, behind a list": (
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<c>"}}, "<c>",
        [5, 2, 6], "<c>",
    ),
    "special_tokens_map, additional": (
        {"special_tokens_map": {"additional_special_tokens": ["<b>", "<c>"]}}, "<c>a", [14, 0], "a",
    ),
    "added_tokens.json": ({"added_tokens": {"<c>": 14, "<b>": 13}}, "<b><c>", [13, 14], "<b><c>"),
    "added_tokens.json, special": (
        {"added_tokens": {"<c>": 14, "<b>": 13}, "tokenizer_config": {"bos_token": "<c>"}}, "<b><c>", [13, 14], "<b>",
    ),
    "an id that tokenizer.json contradicts": (
        {"added_tokens": {"<a>": 5, "d": 12, "<b>": 13}}, "<a>d<b>", [12, 3, 13], "d<b>",
    ),
    "such an id in a list": (
        {"tokenizer_config": {"added_tokens_decoder": {"3": token("<a>"), "40": token("d", special=False)}}},
        "<a>d", [12, 3], "d",
    ),
    "a text twice": (
        {"tokenizer_config": {"added_tokens_decoder": {"12": token("<a>"), "13": token("<b>"), "14": token("<b>")}}},
        "<a><b>c", [12, 13, 2], "c",
    ),
    "split_special_tokens": ({"tokenizer_config": {"split_special_tokens": True}}, "<a>", [5, 0, 6], "<a>"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "text", "ids", "plain"), CASES.values(), ids=CASES)
def test_tokens_of_the_files_beside_the_tokenizer_are_added(files, text, ids, plain, tmp_path):
    tokenizer = load(tmp_path, **files)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == plain


WRONG = {
    "another id": ({"tokenizer_config": {"added_tokens_decoder": {"40": token("<b>")}}}, r"'<b>' the id 40.* gets 13"),
    "the id of another": ({"tokenizer_config": {"added_tokens_decoder": {"3": token("<b>")}}}, r"the id 3.* gets 13"),
    "another id, added_tokens": ({"added_tokens": {"<b>": 20}}, r"added_tokens.json gives .*'<b>' the id 20"),
    "a gap of ids": (
        {"tokenizer_config": {"added_tokens_decoder": {"13": token("<b>"), "15": token("<c>")}}},
        r"'<c>' the id 15.* gets 14",
    ),
    "no token": ({"tokenizer_config": {"added_tokens_decoder": {"13": "<\n"}}}, r"added_tokens_decoder\[13\] = '<\\n'"),
    "no list": ({"tokenizer_config": {"added_tokens_decoder": ["<b>"]}}, "must map ids to tokens"),
    "no id": ({"tokenizer_config": {"added_tokens_decoder": {"x": token("<b>")}}}, "key 'x'.* a token id"),
    "no id, added_tokens": ({"added_tokens": {"<b>": "13"}}, "'<b>' the id '13'.* a token id"),
    "no flag": ({"tokenizer_config": {"eos_token": {"content": "<b>", "lstrip": "left"}}}, "eos_token .*left"),
    "a number": ({"tokenizer_config": {"eos_token": 2}}, "eos_token 2"),
    "a surrogate": ({"tokenizer_config": {"eos_token": "\ud800"}}, r"eos_token '\\ud800': .*surrogates"),
    "a surrogate, as object": ({"special_tokens_map": {"eos_token": token("\ud800")}}, "eos_token .*surrogates"),
    "a surrogate, listed": (
        {"tokenizer_config": {"added_tokens_decoder": {"13": token("\udfff")}}},
        r"decoder\[13\] .*surrogates",
    ),
    "a surrogate, added_tokens": ({"added_tokens": {"\ud800": 13}}, r"added_tokens.json has '\\ud800'"),
    "false behind a list": (
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": False}},
        "eos_token False",
    ),
    "extra, text": ({"tokenizer_config": {"extra_special_tokens": "<b>"}}, "extra_special_tokens '<b>'.* a list"),
    "additional, a number": ({"special_tokens_map": {"additional_special_tokens": 1}}, "additional_special_tokens 1"),
    "split, text": ({"tokenizer_config": {"split_special_tokens": "no"}}, "split_special_tokens 'no'.* true or false"),
    "a template's name": ({"tokenizer_config": {"chat_template": [{"name": [], "template": "a"}]}}, "not text: 'a'"),
    "no object": ({"special_tokens_map": ["<b>"]}, "special_tokens_map.json holds a JSON list"),
}


@pytest.mark.parametrize(("files", "message"), WRONG.values(), ids=WRONG)
def test_files_that_contradict_the_tokenizer_are_refused(files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, **files)
    assert str(caught.value).isprintable()


FILES = {
    "tokenizer_config": (
        "eos_token", "x_token", "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder",
        "split_special_tokens", "chat_template",
    ),
    "special_tokens_map": ("eos_token", "extra_special_tokens", "additional_special_tokens"),
    "added_tokens": ("<b>", "", "\ud800\n"),
}  # fmt: skip


def drawn_value(rng: random.Random, depth: int = 3) -> object:
    """Any JSON value."""
    if depth and rng.random() < 0.5:
        values = [drawn_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        keys = ("content", "13", "name", "template", "special", "\ud800\n", "default")
        return values if rng.random() < 0.4 else {rng.choice(keys): value for value in values}
    return rng.choice([None, True, False, 0, 13, -1, 2**70, 1.5, "", "<b>", "\ud800", "a\nb", "13", "\0"])


def test_any_json_in_these_files_is_read_or_refused_in_one_line(tmp_path):
    rng, messages, count = random.Random(0), [], 200
    checkpoint(tmp_path)
    for _ in range(count):
        name = rng.choice(list(FILES))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({rng.choice(FILES[name]): drawn_value(rng)}))
        try:
            settings = json.loads((tmp_path / CONFIG).read_text()) if (tmp_path / CONFIG).exists() else {}
            eos_ids(tmp_path, CheckpointTokenizer.load(tmp_path, settings), vocab_size=20)
        except CheckpointError as error:
            messages.append(str(error))
        path.unlink()
    assert all(message.isprintable() for message in messages)
    assert count / 4 < len(messages) < count


# files, and the end tokens they name
ENDS = {
    "tokenizer_config": ({"tokenizer_config": {"eos_token": "</s>"}}, {13}),
    "special_tokens_map": ({"special_tokens_map": {"eos_token": "</s>"}}, {13}),
    "special_tokens_map, behind a list": (
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<a>"}}, {12},
    ),
    "text_config": ({"config": {"text_config": {"eos_token_id": [12, 7]}}}, {7, 12}),
    "generation_config": ({"generation_config": {"eos_token_id": [3, 12]}}, {3, 12}),
    "all": (
        {
            "config": {"eos_token_id": 15, "text_config": {"eos_token_id": 16}},
            "generation_config": {"eos_token_id": 17}, "tokenizer_config": {"eos_token": "</s>"},
        },
        {13, 15, 16, 17},
    ),
    "a default that nobody changed": (
        {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [12]}}, {12},
    ),
    "such a default in text_config": (
        {
            "config": {"eos_token_id": 7, "text_config": {"eos_token_id": 2}},
            "generation_config": {"eos_token_id": [12, 7]},
        },
        {7, 12},
    ),
    "text, and the tokenizer's": ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "</s>"}}, {2, 13}),
    "text of text_config, and the tokenizer's": (
        {"config": {"text_config": {"eos_token_id": 2}}, "tokenizer_config": {"eos_token": "</s>"}}, {2, 13},
    ),
    "an added token, and the tokenizer's": (
        {"config": {"eos_token_id": 13}, "added_tokens": {"<b>": 13}, "tokenizer_config": {"eos_token": "<a>"}},
        {12, 13},
    ),
    "an added token, and generation_config": (
        {"config": {"eos_token_id": 13}, "added_tokens": {"<b>": 13}, "generation_config": {"eos_token_id": 12}},
        {12, 13},
    ),
    "a list that goes further": (
        {"config": {"eos_token_id": [12, 2]}, "generation_config": {"eos_token_id": 12}}, {2, 12},
    ),
    "generation_config, never": ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": -1}}, {2}),
    "generation_config, beyond": ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 99}}, {2}),
    "text that the config alone names": ({"config": {"eos_token_id": 2}}, {2}),
    "ids that never come": ({"config": {"eos_token_id": -1}, "generation_config": {"eos_token_id": 99}}, set()),
    "null": ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}, set()),
}  # fmt: skip


@pytest.mark.parametrize(("files", "ends"), ENDS.values(), ids=ENDS)
def test_end_tokens_of_all_files_count(files, ends, tmp_path):
    tokenizer = load(tmp_path, **files)
    assert eos_ids(tmp_path, tokenizer, vocab_size=20) == ends


def test_end_tokens_are_found_without_a_tokenizer(tmp_path):
    checkpoint(tmp_path, tokenizer_config={"eos_token": "<b>", "added_tokens_decoder": {"13": token("<b>")}})
    assert eos_ids(tmp_path, None, vocab_size=20) == {13}


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_end_token_that_is_no_id_is_refused(name, tmp_path):
    checkpoint(tmp_path, **{name: {"eos_token_id": "</s>"}})
    with pytest.raises(ConfigError, match=f"{name}.json has eos_token_id '</s>'"):
        eos_ids(tmp_path, None, vocab_size=20)


def test_a_stop_string_that_is_a_special_token_stands_for_its_id(tmp_path):
    tokenizer = load(tmp_path, tokenizer_config={"eos_token": "</s>"}, added_tokens={"<b>": 13})
    assert special_stop_ids(tokenizer, ["<a>", "a", "</s>", "<b>", "b"], vocab_size=20) == {12, 14}
    assert special_stop_ids(tokenizer, ["<a>", "</s>"], vocab_size=13) == {12}
    assert special_stop_ids(None, ["<a>"], vocab_size=20) == set()


def test_chat_templates_may_name_every_special_token():
    names = {name: f"<{name}>" for name in ("sep_token", "cls_token", "mask_token", "image_token")}
    assert added_tokens(names | {"eos_token": token("</s>"), "additional_special_tokens": ["<x>"]}).variables() == {
        **names, "eos_token": "</s>", "additional_special_tokens": ["<x>"],
    }  # fmt: skip

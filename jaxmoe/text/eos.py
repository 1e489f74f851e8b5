"""End-of-sequence token ids of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.errors import ConfigError
from jaxmoe.text.added_tokens import CONFIG as TOKENIZER_CONFIG
from jaxmoe.text.added_tokens import read_added_tokens
from jaxmoe.text.tokenizer import CheckpointTokenizer
from jaxmoe.weights.checkpoint import CONFIG, read_json

_GENERATION = "generation_config.json"
_KEY = "eos_token_id"


def eos_ids(directory: Path, tokenizer: CheckpointTokenizer | None, *, vocab_size: int) -> frozenset[int]:
    """Return every end token id that the files of a checkpoint directory name.

    These are eos_token_id of generation_config.json, of config.json and of its text_config, and eos_token of
    tokenizer_config.json and special_tokens_map.json. Ids outside the vocabulary, such as -1, are ignored: the model
    never samples them. A single id of config.json (or of its text_config) is also ignored if generation_config.json
    names ids of the vocabulary and the id is an ordinary word piece, neither added nor special. Config classes write
    this default (2 for Llama) into files with another vocabulary, and answers would end in the middle of a sentence.
    Raises: ConfigError for a value that is not an id, CheckpointError for a file that cannot be read.
    """
    config = read_json(directory / CONFIG)
    nested = config.get("text_config")
    vocabulary = range(vocab_size)
    generation = _ids(_GENERATION, read_json(directory / _GENERATION, required=False)).intersection(vocabulary)
    places = [_ids(CONFIG, config)]
    if isinstance(nested, Mapping):
        places.append(_ids(f"{CONFIG}: text_config", nested))
    if tokenizer is None:
        settings = read_json(directory / TOKENIZER_CONFIG, required=False)
        named = read_added_tokens(directory, settings).end_ids(None)
    else:
        named = tokenizer.end_ids
        if generation:
            defaults = [ids for ids in places if len(ids) == 1 and all(map(tokenizer.is_word_piece, ids))]
            places = [ids for ids in places if ids not in defaults]
    return frozenset(generation.union(named, *places).intersection(vocabulary))


def special_stop_ids(tokenizer: CheckpointTokenizer | None, stop: Iterable[str], *, vocab_size: int) -> frozenset[int]:
    """Return the ids of stop strings that are special tokens, since decoded text never contains special tokens."""
    special_ids = [] if tokenizer is None else [tokenizer.special_id(text) for text in stop]
    return frozenset(one for one in special_ids if one is not None and one < vocab_size)


def _ids(name: str, values: Mapping[str, Any]) -> set[int]:
    value = values.get(_KEY)
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    if not all(type(one) is int for one in ids):
        raise ConfigError(f"{name} has {_KEY} {str(value)[:60]!r}; it must be a whole number or a list of them")
    return set(ids)

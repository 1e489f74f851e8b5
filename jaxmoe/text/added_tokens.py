"""Tokens that other files of a checkpoint add to tokenizer.json, read as transformers reads them.

tokenizer_config.json names the special tokens (eos_token, extra_special_tokens, ...). It may also list all added tokens
by id (added_tokens_decoder). Older checkpoints lack this list: there special_tokens_map.json overrides the names of
tokenizer_config.json, and added_tokens.json gives the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from jaxmoe.checks import is_unicode
from jaxmoe.errors import CheckpointError, listed
from jaxmoe.weights.checkpoint import read_json

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _LEGACY_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_END = "eos_token"
_DECODER = "added_tokens_decoder"


@dataclass(frozen=True, kw_only=True)
class AddedTokens:
    """Hold the added tokens of one checkpoint.

    named: the text of each named special token, by name ("eos_token"). extra: the texts of special tokens without a
    name. special: both kinds as AddedToken, in the order in which they are added. by_id: all tokens with an explicit
    id. listed_in: the file that gives these ids. ends: the texts of the end tokens, from any of the files.
    """

    named: Mapping[str, str]
    extra: tuple[str, ...]
    special: tuple[AddedToken, ...]
    by_id: Mapping[int, AddedToken]
    listed_in: str
    ends: tuple[str, ...]

    def variables(self) -> dict[str, Any]:
        """Return the variables of chat templates: the text of every named token, and the list of extra tokens."""
        return dict(self.named) | ({_LEGACY_EXTRA: list(self.extra)} if self.extra else {})

    def add_to(self, tokenizer: HFTokenizer) -> None:
        """Add the missing tokens to a tokenizer. A token that the tokenizer already has keeps its id.

        Raises: CheckpointError if a new token would get another id than the files give it.
        """
        lacking: dict[str, set[int]] = {}
        for token_id, token in self.by_id.items():
            if tokenizer.token_to_id(token.content) is None:
                lacking.setdefault(token.content, set()).add(token_id)
        there = tokenizer.get_added_tokens_decoder()
        same = {repr(token) for token in there.values()}
        new = [token for _, token in sorted(self.by_id.items()) if repr(token) not in same]
        known = {token.content for token in (*there.values(), *new)}
        new += [token for token in self.special if token.content not in known]
        for token in new:
            token.special = token.special or token.content in self.named.values()
        tokenizer.add_tokens(new)
        for content, ids in lacking.items():
            if (known_id := tokenizer.token_to_id(content)) not in ids:
                raise CheckpointError(
                    f"{self.listed_in} gives the token {content[:60]!r} the id {min(ids)}, but with tokenizer.json "
                    f"it gets {known_id}: the two files do not match; fetch both again"
                )

    def end_ids(self, tokenizer: HFTokenizer | None) -> set[int]:
        """Return the ids of the end tokens. Without a tokenizer the list of added tokens gives the ids."""
        ids = {token.content: token_id for token_id, token in self.by_id.items()}
        token_ids = {ids.get(end) if tokenizer is None else tokenizer.token_to_id(end) for end in self.ends}
        return {token_id for token_id in token_ids if token_id is not None}


def read_added_tokens(directory: Path, settings: Mapping[str, Any]) -> AddedTokens:
    """Read the added tokens of a checkpoint directory. settings: its tokenizer_config.json. Raises: CheckpointError."""
    special_map, ids = (read_json(directory / name, required=False) for name in (SPECIAL_MAP, ADDED))
    return added_tokens(settings, special_map, ids)


def added_tokens(
    settings: Mapping[str, Any], special_map: Mapping[str, Any] = MappingProxyType({}),
    ids: Mapping[str, Any] = MappingProxyType({}),
) -> AddedTokens:  # fmt: skip
    """Collect the added tokens of the three files. Raises: CheckpointError naming an invalid entry."""
    is_listed = settings.get(_DECODER) is not None
    for name, file in ((CONFIG, settings), (SPECIAL_MAP, {} if is_listed else special_map)):
        _check_extra(name, file)
    values = _merged(settings, {} if is_listed else special_map)
    named = {name: values[name] for name in _NAMES if values.get(name) is not None}
    named |= {name: value for name, value in values.items() if name.endswith("_token") and _is_token(value)}
    named |= values[_EXTRA] if isinstance(values[_EXTRA], Mapping) else {}  # a model's own names, such as image_token
    extra = _as_list(values[_EXTRA])
    # A text may occur several times with different settings. Then the tokenizer applies the last ones.
    tokens: dict[tuple[bool, str], AddedToken] = {}
    for name, value in (*named.items(), *((_EXTRA, one) for one in extra)):
        token = _special(name, value)
        tokens.setdefault((isinstance(value, str), repr(token)), token)
    texts = {name: _text(value) for name, value in named.items()}
    if is_listed:
        by_id = _listed(settings[_DECODER])
    else:
        by_id = _legacy_listed(ids, {_text(one) for one in extra} | {texts[name] for name in _NAMES if name in texts})
    ends = [_special(_END, file[_END]).content for file in (settings, special_map) if file.get(_END) is not None]
    return AddedTokens(
        named=texts, extra=tuple(map(_text, extra)), special=tuple(tokens.values()), by_id=by_id,
        listed_in=CONFIG if is_listed else ADDED, ends=tuple(dict.fromkeys(ends)),
    )  # fmt: skip


def _merged(settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of tokenizer_config.json, overridden by the values of special_tokens_map.json."""
    values = dict(settings)
    if not values.get(_EXTRA) and _LEGACY_EXTRA in values:
        values[_EXTRA] = values.pop(_LEGACY_EXTRA)
    both = [*_as_list(values.get(_EXTRA)), *_as_list(special_map.get(_EXTRA))]
    values |= special_map
    if isinstance(special_map.get(_EXTRA), list):
        values[_EXTRA] = both
    if _EXTRA not in values:
        values[_EXTRA] = values.get(_LEGACY_EXTRA)
    return values


def _check_extra(name: str, file: Mapping[str, Any]) -> None:
    for key in (_EXTRA, _LEGACY_EXTRA):
        if not isinstance(value := file.get(key), list | Mapping | None):
            raise CheckpointError(
                f"{name} has {key} {value!r:.60}: it must be a list of tokens, or map names to tokens; fetch it again"
            )


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "content" in value)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value["content"]


def _special(name: str, value: Any) -> AddedToken:
    """Return a special token from its text, or from an object with its settings."""
    what = f"{listed([name])} {value!r:.60}"
    if isinstance(value, str):
        return _token(what, {"content": value}, special=True)
    return _token(what, value, special=True)


def _token(what: str, value: Any, **fixed: bool) -> AddedToken:
    """Return a token from an object with its text and settings. Raises: CheckpointError for anything else."""
    if isinstance(value, Mapping) and isinstance(content := value.get("content"), str) and is_unicode(content):
        try:
            return AddedToken(content, **{flag: value[flag] for flag in _FLAGS if flag in value} | fixed)
        except TypeError:
            pass
    raise CheckpointError(
        f"{CONFIG} or {SPECIAL_MAP} has {what}: a token must be text without lone surrogates, or an object with "
        f"content and lstrip, rstrip, single_word, normalized and special; fetch it again"
    )


def _listed(decoder: Any) -> dict[int, AddedToken]:
    """Return the tokens of an added_tokens_decoder, by id. Raises: CheckpointError for an invalid entry."""
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{CONFIG} has {_DECODER} {decoder!r:.40}: it must map ids to tokens; fetch it again")
    tokens = {}
    for token_id, value in decoder.items():
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) < 10):
            raise CheckpointError(
                f"{CONFIG} has {_DECODER} key {token_id[:40]!r}: it must be a token id; fetch it again"
            )
        tokens[int(token_id)] = _token(f"{_DECODER}[{token_id}] = {value!r:.60}", value)
    return tokens


def _legacy_listed(ids: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Return the tokens of an added_tokens.json, by id. Raises: CheckpointError for an invalid entry."""
    tokens = {}
    for content, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise CheckpointError(
                f"{ADDED} gives {content[:40]!r} the id {token_id!r:.40}: it must be a token id; fetch it again"
            )
        if not is_unicode(content):
            raise CheckpointError(
                f"{ADDED} has {content[:40]!r}: a token must be text without lone surrogates; fetch it again"
            )
        is_special = content in special
        tokens[token_id] = AddedToken(content, normalized=not is_special, special=is_special)
    return tokens

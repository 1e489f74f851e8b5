"""Text to ids and back with a checkpoint's tokenizer.json, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from jaxmoe.errors import CheckpointError, RequestError

Message = Mapping[str, str]


class Tokenizer:
    """tokenizer.json with the settings beside it."""

    def __init__(self, tokenizer: HFTokenizer, settings: Mapping[str, Any], chat_template: str | None) -> None:
        self._tokenizer, self._settings, self._template = tokenizer, settings, chat_template

    @classmethod
    def load(cls, directory: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
        """The tokenizer of a checkpoint directory, None if it has none. settings: its tokenizer_config.json."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
        tokenizer.no_truncation()  # files may carry settings of their training
        tokenizer.no_padding()
        return cls(tokenizer, settings, _read_template(directory, settings))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of text; special adds the tokens the tokenizer puts around every text.

        Raises: RequestError for text that is not Unicode (lone surrogates, as from a command line of other bytes).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt {text[:40]!r} is not valid Unicode: {error.reason}; give UTF-8") from error
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer; encode it with special=False.

        Raises: RequestError if there is no template or it refuses the messages.
        """
        if self._template is None:
            raise RequestError("this model has no chat template: give plain prompts")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # What published templates expect besides the messages.
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            template = environment.from_string(self._template)
            return template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens(),
            )
        except Exception as error:  # the template is foreign code, and may fail in any way
            raise RequestError(f"the chat template refused the messages: {error}") from error

    def _special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = self._settings.get(name)
            value = value.get("content") if isinstance(value, Mapping) else value
            if value is not None:
                tokens[name] = str(value)
        return tokens


def _read_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else that of tokenizer_config.json. Raises: CheckpointError."""
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{beside} is not readable text: {error}; fetch it again") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones: the default
        named = [t for t in template if isinstance(t, Mapping) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory / 'tokenizer_config.json'} has a chat_template that is not text")
    return template


class TextStream:
    """Text of a growing list of ids: gives out what no later token can change, and watches for stop strings."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Text of ids before _read is settled. Decoding starts at _context, the clean boundary before it: what an id
        # reads as may depend on its neighbour, and bytes of one character may be spread over several ids.
        self._context = self._read = 0
        self._pending = ""  # settled, but it may be the start of a stop string
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """The new final text after one more token; sets `stopped` once a stop string has come."""
        self._ids.append(token)
        return self._advance(last=False)

    def finish(self) -> str:
        """Whatever text was still held back."""
        return "" if self.stopped else self._advance(last=True)

    def _advance(self, *, last: bool) -> str:
        if self._tokenizer is None:
            return ""
        self._settle(last=last)
        pending = self._pending
        found = [at for at in (pending.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            delta = pending[: min(found)]
        else:
            delta = pending if last else pending[: len(pending) - self._held_back(pending)]
        self._pending = pending[len(delta) :]
        self._shown.append(delta)
        return delta

    def _settle(self, *, last: bool) -> None:
        """Take up the text of new ids, unless it ends inside a character (then wait, except at the last)."""
        assert self._tokenizer is not None
        before = self._tokenizer.decode(self._ids[self._context : self._read])
        text = self._tokenizer.decode(self._ids[self._context :])
        if last or not text.endswith("\ufffd"):
            self._pending += text[len(before) :]
            self._context, self._read = self._read, len(self._ids)

    def _held_back(self, text: str) -> int:
        """How many last characters might be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-count:]) for s in self._stop):
                return count
        return 0

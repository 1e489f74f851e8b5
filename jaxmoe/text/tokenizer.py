"""The tokenizer of a checkpoint: encoding, decoding, chat templates, and text streams with stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from jaxmoe.errors import CheckpointError, RequestError
from jaxmoe.text.added_tokens import CONFIG, AddedTokens, added_tokens, read_added_tokens
from jaxmoe.text.chat import DEFAULT, Message, read_templates, render
from jaxmoe.text.detokenize import IncrementalDetokenizer, TokenDecoder


class CheckpointTokenizer:
    """Encode and decode text with a checkpoint's tokenizer.json and its settings.

    chat_template: one template, or several by name. added: the added tokens of the settings; the tokenizer already
    includes them.
    """

    def __init__(
        self,
        tokenizer: HFTokenizer,
        settings: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None,
        added: AddedTokens | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = {DEFAULT: chat_template} if isinstance(chat_template, str) else chat_template or {}
        self._added = added_tokens(settings) if added is None else added
        self.decoder = TokenDecoder(tokenizer)

    @classmethod
    def load(cls, directory: Path, settings: Mapping[str, Any]) -> CheckpointTokenizer | None:
        """Load the tokenizer of a checkpoint directory; return None if it has no tokenizer.json.

        settings: the parsed tokenizer_config.json.
        Raises: CheckpointError for a file that cannot be read, or files that contradict each other.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
        tokenizer.no_truncation()  # the file may have truncation and padding of the training
        tokenizer.no_padding()
        split = settings.get("split_special_tokens")
        if not isinstance(split, bool | None):
            raise CheckpointError(
                f"{directory / CONFIG} has split_special_tokens {split!r:.60}: it must be true or false; fetch it again"
            )
        tokenizer.encode_special_tokens = split is True
        added = read_added_tokens(directory, settings)
        added.add_to(tokenizer)
        return cls(tokenizer, settings, read_templates(directory, settings), added)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text. special: add the tokens that the tokenizer puts around every text.

        Raises: RequestError for text with lone surrogates, as from a command line that is not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt {text[:40]!r} is not valid Unicode: {error.reason}; give UTF-8") from error
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Render a conversation into a prompt for the assistant's answer. Encode the prompt with special=False.

        tools: JSON schemas of functions that the answer may call.
        Raises: RequestError if there is no template, or the template rejects the messages.
        """
        return render(self._templates, messages, variables=self._added.variables(), tools=tools)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with exactly this text; None if it does not exist."""
        token_id = self._tokenizer.token_to_id(text)
        return None if token_id is None or self.is_text(token_id) else token_id

    def is_text(self, token_id: int) -> bool:
        """Return whether an id is part of decoded text: known, and not special."""
        return self.decoder.token(token_id) is not None

    def is_word_piece(self, token_id: int) -> bool:
        """Return whether an id belongs to the base vocabulary: known, and neither added nor special."""
        return self.is_text(token_id) and token_id not in self._tokenizer.get_added_tokens_decoder()

    @property
    def end_ids(self) -> set[int]:
        """Return the ids of the end tokens that the tokenizer's files name."""
        return self._added.end_ids(self._tokenizer)


class TextStream:
    """Stream the text of an answer: emit text once it is final, and end at a stop string.

    The text of the prompt followed by the text of the answer equals the decoded ids of both, without special tokens.
    prompt: ids of the prompt. stop: strings that end the text and are not part of it. min_tokens: number of tokens
    before a stop string may end the text; the string may begin in them, but a later token must complete it.
    """

    def __init__(
        self,
        tokenizer: CheckpointTokenizer | None,
        stop: Sequence[str],
        *,
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer.decoder, prompt)
        self._stop = tuple(stop)
        self._num_unchecked = min_tokens  # tokens left before stop strings are checked
        self._pending = ""  # final text that may be the start of a stop string
        self._checked_from = 0  # a stop string must end after this index of _pending
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Return all text emitted so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Add a token and return the new final text. Set `stopped` if a stop string was completed."""
        if self._detokenizer is None:
            return ""
        self._pending += self._detokenizer.push(token)
        if self._num_unchecked:
            self._num_unchecked -= 1
            self._checked_from = len(self._pending)
        return self._give(last=False)

    def finish(self) -> str:
        """Return the remaining text."""
        if self._detokenizer is None or self.stopped:
            return ""
        self._pending += self._detokenizer.finish()
        if self._num_unchecked:
            self._checked_from = len(self._pending)
        return self._give(last=True)

    def _give(self, *, last: bool) -> str:
        pending = self._pending
        positions = [at for at in map(self._find, self._stop) if at >= 0]
        if positions:
            self.stopped = True
            delta = pending[: min(positions)]
        else:
            delta = pending if last else pending[: len(pending) - self._held_back(pending)]
        self._pending = pending[len(delta) :]
        self._checked_from = max(0, self._checked_from - len(delta))
        self._shown.append(delta)
        return delta

    def _find(self, stop: str) -> int:
        """Return the index of a stop string in the pending text; -1 if it is absent."""
        return self._pending.find(stop, max(0, self._checked_from - len(stop) + 1))

    def _held_back(self, text: str) -> int:
        """Return the number of characters at the end that may be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(len(s) > count and s.startswith(text[-count:]) for s in self._stop):
                return count
        return 0

"""Incremental detokenization: the text that each new token of an answer adds.

The text of a token depends on its neighbors. Most decoders drop the leading space of a text's first token, and the
bytes of one character may be spread over several tokens. So tokens are decoded in a window that begins some tokens
earlier, in the prompt if necessary. A character is emitted once it is complete. The window is bounded: time is linear
in the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from tokenizers import Tokenizer as HFTokenizer

# A character has at most 4 bytes and a token at least one, so an incomplete character spans at most the last 3 units.
_LONGEST, _KEPT = 16, 8  # units: a window that grows to the first is cut to the second
# This token starts a window in place of earlier tokens. Otherwise the window's first token would be decoded as the
# first of a text.
_ANCHOR = ("a",)
_REPLACEMENT = "\ufffd"  # decoders replace invalid bytes by it
_CONTINUATIONS = ("Ģ", "¿")  # bytes 80 and BF in byte-level vocabularies: one of them continues any character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Unit = tuple[str, ...]  # token strings that are decoded together: one, or the byte tokens of one character


class TokenDecoder:
    """Convert ids to token strings, and token strings to text. Special tokens are left out."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._id_to_token, self._decoder = tokenizer.id_to_token, tokenizer.decoder
        self._special = {
            token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or tokenizer.decode([token_id]) != tokenizer.decode([token_id], skip_special_tokens=False)
        }
        self.is_byte_level = self.join(["Ã"]) == _REPLACEMENT  # the byte C3, which begins a character
        self.has_byte_tokens = self.join(["<0x41>"]) == "A"

    def token(self, token_id: int) -> str | None:
        """Return the token string of an id; None if the id is special or unknown to the tokenizer."""
        token = self._id_to_token(token_id)
        return None if token in self._special else token

    def join(self, tokens: list[str]) -> str:
        """Return the text of a list of token strings."""
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)


class _ByteTokens:
    """Group byte tokens such as <0xE2> into characters. An invalid byte becomes U+FFFD.

    A decoder that supports byte tokens replaces all bytes of a run by U+FFFD if one of them is invalid. This is known
    only at the end of the run, too late for a stream. So this class preserves the characters before an invalid byte.
    """

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._bytes = b""

    def push(self, token: str) -> Iterator[Unit]:
        """Add a token and yield the units that it completes."""
        matched = _BYTE_TOKEN.fullmatch(token)
        if matched is None:
            yield from self.flush()
            yield (token,)
            return
        self._tokens.append(token)
        self._bytes += bytes.fromhex(matched[1])
        while self._bytes:
            try:
                self._bytes.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return
                yield (_REPLACEMENT,)  # for the first byte; the bytes after it may begin a character
                self._tokens, self._bytes = self._tokens[1:], self._bytes[1:]
            else:
                yield tuple(self._tokens)
                self._tokens, self._bytes = [], b""

    def flush(self) -> list[Unit]:
        """Return one U+FFFD for each byte of an incomplete character, and clear them."""
        units: list[Unit] = [(_REPLACEMENT,)] * len(self._tokens)
        self._tokens, self._bytes = [], b""
        return units


class IncrementalDetokenizer:
    """Decode a growing answer: text of the prompt + emitted text = text of all ids.

    prompt: ids of the prompt. If its last ids are the beginning of a character, the text of the prompt ends before it.
    """

    def __init__(self, decoder: TokenDecoder, prompt: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._bytes = _ByteTokens() if decoder.has_byte_tokens else None
        self._units: list[Unit] = []
        self._text = ""  # of the window
        self._num_shown = 0  # characters of the window that were emitted
        self._has_answer = False
        seen = (token for token in map(decoder.token, reversed(prompt)) if token is not None)
        tokens = list(islice(seen, _LONGEST))
        if len(tokens) == _LONGEST:
            self._units.append(_ANCHOR)
        for token in reversed(tokens):
            self._units += self._grouped(token)
        if self._units:
            self._text = self._join()
            self._num_shown = self._num_final()

    def push(self, token_id: int) -> str:
        """Add an id and return the text that became final."""
        token = self._decoder.token(token_id)
        if token is None:
            return ""
        self._has_answer = True
        self._units += (units := self._grouped(token))
        return self._advance(last=False) if units else ""

    def finish(self) -> str:
        """Return the remaining text: an incomplete character as U+FFFD."""
        if not self._has_answer:
            return ""
        self._units += [] if self._bytes is None else self._bytes.flush()
        return self._advance(last=True)

    def _grouped(self, token: str) -> list[Unit]:
        return [(token,)] if self._bytes is None else list(self._bytes.push(token))

    def _join(self) -> str:
        return self._decoder.join(list(chain.from_iterable(self._units)))

    def _num_final(self) -> int:
        """Return the number of final characters of the window: all, or all except an incomplete last one."""
        if not self._decoder.is_byte_level or not self._text.endswith(_REPLACEMENT):
            return len(self._text)
        end = list(chain.from_iterable(self._units[-3:]))
        length = len(self._decoder.join(end))
        is_unfinished = any(len(self._decoder.join([*end, more])) == length for more in _CONTINUATIONS)
        return len(self._text) - is_unfinished

    def _advance(self, *, last: bool) -> str:
        self._text = self._join()
        num_final = len(self._text) if last else self._num_final()
        delta = self._text[self._num_shown : num_final]
        self._num_shown = max(self._num_shown, num_final)
        if len(self._units) >= _LONGEST:  # counted from the end, where the texts of both windows agree
            num_held = len(self._text) - self._num_shown
            self._units = [_ANCHOR, *self._units[-_KEPT:]]
            self._text = self._join()
            self._num_shown = len(self._text) - num_held
        return delta

"""Incremental detokenization: the text that each token of an answer adds to that of the prompt and the tokens before.

The text of a token depends on its neighbors: most decoders drop the leading space of a text's first token, and the
bytes of one character may be spread over several tokens. So tokens are decoded in a window that begins before the
newest one, in the prompt if need be, and a character is given out once it is whole. The window is bounded: time is
linear in the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from tokenizers import Tokenizer as HFTokenizer

# A character has 4 bytes at most and a token at least one, so an unfinished character lies in the last 3 units.
_LONGEST, _KEPT = 16, 8  # units of a window: it is cut down to the last _KEPT when it reaches _LONGEST
# Begins a window in place of earlier tokens, so that none of the window's own is decoded as the first of a text.
_ANCHOR = ("a",)
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character
_CONTINUATIONS = ("Ģ", "¿")  # bytes 80 and BF in byte-level vocabularies: one of them goes on with any character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Unit = tuple[str, ...]  # token strings that are decoded together: one, or the byte tokens of one character


class TokenDecoder:
    """A tokenizer's way from ids to token strings, and from those to text; special tokens are left out."""

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
        """The string of an id, None if it is special or unknown to the tokenizer."""
        token = self._id_to_token(token_id)
        return None if token in self._special else token

    def join(self, tokens: list[str]) -> str:
        """The text of a list of token strings."""
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)


class _ByteTokens:
    """Groups byte tokens such as <0xE2> into characters; a byte that belongs to none becomes U+FFFD.

    A decoder that knows byte tokens turns all bytes of a run into U+FFFD where one of them is invalid. Which runs those
    are is known at their ends alone, too late for a stream: characters before an invalid byte are kept here.
    """

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._bytes = b""

    def push(self, token: str) -> Iterator[Unit]:
        """The units that are complete with one more token."""
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
                yield (_REPLACEMENT,)  # for the first byte; those after it may begin a character
                self._tokens, self._bytes = self._tokens[1:], self._bytes[1:]
            else:
                yield tuple(self._tokens)
                self._tokens, self._bytes = [], b""

    def flush(self) -> list[Unit]:
        """The bytes of an unfinished character, as U+FFFD each."""
        units: list[Unit] = [(_REPLACEMENT,)] * len(self._tokens)
        self._tokens, self._bytes = [], b""
        return units


class Detokenizer:
    """Text of a growing list of ids that follow a prompt: text of prompt + text given out = text of all ids.

    The text of the prompt ends before a character that its last ids begin and do not finish. prompt: its ids.
    """

    def __init__(self, decoder: TokenDecoder, prompt: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._bytes = _ByteTokens() if decoder.has_byte_tokens else None
        self._units: list[Unit] = []
        self._text = ""  # of the window
        self._num_shown = 0  # characters of it that were given out
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
        """Return the text that is final with one more id."""
        token = self._decoder.token(token_id)
        if token is None:
            return ""
        self._has_answer = True
        self._units += (units := self._grouped(token))
        return self._advance(last=False) if units else ""

    def finish(self) -> str:
        """Return the rest: an unfinished character, as U+FFFD."""
        if not self._has_answer:
            return ""
        self._units += [] if self._bytes is None else self._bytes.flush()
        return self._advance(last=True)

    def _grouped(self, token: str) -> list[Unit]:
        return [(token,)] if self._bytes is None else list(self._bytes.push(token))

    def _join(self) -> str:
        return self._decoder.join(list(chain.from_iterable(self._units)))

    def _num_final(self) -> int:
        """Count the characters of the window that no later token changes: all, or all but an unfinished last one."""
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

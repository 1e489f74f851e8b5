"""Text of a prompt + streamed text of an answer = text of all ids, for random small tokenizers of every common kind."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from jaxmoe.text.detokenize import TokenDecoder
from jaxmoe.text.tokenizer import CheckpointTokenizer, TextStream

SPACE = "\u2581"
LETTERS = ["a", "b", "cd", "é", "世", "🦙", "\ufffd", ".", ",", "'s", "##x"]
WORDS = [SPACE, SPACE + SPACE, SPACE + "a", SPACE + "world", SPACE * 3 + "b", "b" + SPACE, *LETTERS]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MULTIBYTE = f"é世界🦙ü\ufffd{SPACE}".encode()
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTE_OF = {  # the byte-level alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and what follows
    letter: byte for byte in range(256) if (letter := chr(byte)) in ALPHABET
}
BYTE_OF |= dict(zip(sorted(ALPHABET - BYTE_OF.keys()), sorted(set(range(256)) - set(BYTE_OF.values())), strict=True))
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


def llama_decoder(rng: random.Random) -> decoders.Decoder:
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if rng.random() < 0.7 else parts)


def metaspace(rng: random.Random) -> decoders.Decoder:
    return decoders.Metaspace(prepend_scheme=rng.choice(["always", "first", "never"]))


def pieces_of_bytes(rng: random.Random) -> list[str]:
    """Byte-level tokens: single bytes, halves of characters, words."""
    drawn = [bytes([rng.choice(MULTIBYTE)]) for _ in range(6)] + [bytes([rng.randrange(256)]) for _ in range(3)]
    for _ in range(8):
        start = rng.randrange(len(MULTIBYTE))
        drawn.append(MULTIBYTE[start : start + rng.randrange(1, 6)])
    drawn += [b" a", b"world", b" ", b"\xe4", "世".encode()]
    return ["".join(LETTER_OF[byte] for byte in token) for token in drawn]


def some_bytes(rng: random.Random) -> list[str]:
    return [BYTES[byte] for byte in sorted(set(MULTIBYTE))] + rng.sample(BYTES, 6)


KINDS = {
    "byte-level": (pieces_of_bytes, lambda rng: decoders.ByteLevel(), "bpe"),
    "Metaspace": (lambda rng: WORDS, metaspace, "bpe"),
    "byte fallback": (lambda rng: WORDS + some_bytes(rng), llama_decoder, "bpe"),
    "WordPiece": (
        lambda rng: ["hello", "##ing", "##s", "##世", "n't", *LETTERS],
        lambda rng: decoders.WordPiece("##", cleanup=rng.random() < 0.5),
        "wordpiece",
    ),
    "Unigram": (lambda rng: WORDS + some_bytes(rng) * rng.randrange(2), metaspace, "unigram"),
    "Unigram, byte fallback": (lambda rng: WORDS + some_bytes(rng), llama_decoder, "unigram"),
    "bytes before Metaspace": (
        lambda rng: WORDS + some_bytes(rng),
        lambda rng: decoders.Sequence([decoders.ByteFallback(), metaspace(rng)]),
        "unigram",
    ),
    "</w>": (lambda rng: ["a</w>", "b", "世</w>", *LETTERS], lambda rng: decoders.BPEDecoder("</w>"), "bpe"),
    "no decoder": (lambda rng: LETTERS, lambda rng: None, "bpe"),
}


def random_tokenizer(kind: str, rng: random.Random) -> tuple[CheckpointTokenizer, list[int]]:
    """A tokenizer, and ids to draw from: its tokens, special ones, and some that it lacks."""
    tokens, decoder, model = KINDS[kind]
    vocab = list(dict.fromkeys(["<unk>", *tokens(rng)]))
    rng.shuffle(vocab)
    if model == "unigram":
        tokenizer = HFTokenizer(models.Unigram([(token, -1.0) for token in vocab], unk_id=vocab.index("<unk>")))
    else:
        count = len(vocab)  # added tokens get the ids from here on; some below and beyond them stay free
        ids = dict(zip(vocab, rng.sample([*range(count), *range(count + 8, 2 * count)], count), strict=True))
        made = models.WordPiece if model == "wordpiece" else models.BPE
        tokenizer = HFTokenizer(made(ids, unk_token="<unk>") if model == "wordpiece" else made(ids, []))
    if (made_decoder := decoder(rng)) is not None:
        tokenizer.decoder = made_decoder
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<|end|>", lstrip=rng.random() < 0.5)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken(" big é", special=False)])
    known = sorted(tokenizer.get_vocab().values())
    assert tokenizer.get_vocab_size() == len(set(known))
    unknown = [max(known) + 1, *sorted(set(range(max(known))) - set(known))[:4]]
    return CheckpointTokenizer(tokenizer, {}, None), known + unknown + [tokenizer.token_to_id("<s>")] * 3


def unfinished(data: bytes) -> int:
    """How many last bytes begin a character and do not finish it."""
    for count in (1, 2, 3):
        try:
            data[-count:].decode()
        except UnicodeDecodeError as error:
            if (error.start, error.reason) == (0, "unexpected end of data"):
                return count
    return 0


def byte_run(tokens: list[str]) -> bytes:
    """The bytes of the byte tokens that a list ends with."""
    run: list[int] = []
    for token in reversed(tokens):
        if token not in BYTES:
            break
        run.insert(0, BYTES.index(token))
    return bytes(run)


def mended(tokens: list[str]) -> list[str]:
    """Tokens whose runs of bytes are valid: bytes that are no text stand as U+FFFD, each by itself."""
    out: list[str] = []
    at = 0
    while at < len(tokens):
        end = at
        while end < len(tokens) and tokens[end] in BYTES:
            end += 1
        if end == at:
            out.append(tokens[at])
            at += 1
            continue
        for letter in byte_run(tokens[at:end]).decode("utf-8", "surrogateescape"):
            no_text = "\udc80" <= letter <= "\udcff"
            out += ["\ufffd"] if no_text else [BYTES[byte] for byte in letter.encode()]
        at = end
    return out


def text_of(tokenizer: CheckpointTokenizer, ids: list[int], *, to_whole_character: bool = False) -> str:
    """The reference: all ids decoded at once; to_whole_character: without an unfinished last character."""
    decoder = tokenizer.decoder
    tokens = [token for token in map(decoder.token, ids) if token is not None]
    if decoder.has_byte_tokens:
        if to_whole_character and (count := unfinished(byte_run(tokens))):
            tokens = tokens[:-count]
        if (valid := mended(tokens)) != tokens:
            return decoder.join(valid)
        assert decoder.join(tokens) == tokenizer.decode(ids) or to_whole_character
        return decoder.join(tokens)
    text = tokenizer.decode(ids)
    if to_whole_character and decoder.is_byte_level:
        spelled = [bytes(map(BYTE_OF.get, t)) if BYTE_OF.keys() >= set(t) else t.encode() for t in tokens]
        return text[: len(text) - bool(unfinished(b"".join(spelled)))]
    return text


def streamed(
    tokenizer: CheckpointTokenizer, prompt: list[int], answer: list[int], stop=(), **options
) -> tuple[str, bool]:
    """The text of an answer and whether a stop string ended it; what the stream gave out joins to it."""
    stream = TextStream(tokenizer, stop, prompt=prompt, **options)
    parts = []
    for token in answer:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    parts.append(stream.finish())
    assert "".join(parts) == stream.text
    return stream.text, stream.stopped


def check_pairs(num_pairs: int, seed: int) -> None:
    """Hold num_pairs random answers, of tokenizers of every kind, against the text of all ids."""
    rng = random.Random(seed)
    kinds, each = list(KINDS), 12
    for number in range(num_pairs):
        if number % each == 0:
            kind = kinds[number // each % len(kinds)]
            tokenizer, known = random_tokenizer(kind, rng)
        few = rng.sample(known, min(len(known), rng.choice([2, 4, 1000])))
        prompt = [rng.choice(few) for _ in range(rng.choice([0, 0, 1, 2, 5, 25]))]
        answer = [rng.choice(few) for _ in range(rng.choice([1, 3, 10, 30]))]
        whole, head = text_of(tokenizer, prompt + answer), text_of(tokenizer, prompt, to_whole_character=True)
        text, _ = streamed(tokenizer, prompt, answer)
        if all(tokenizer.decoder.token(token) is None for token in answer):
            assert text == ""
            continue
        assert head + text == whole, (kind, seed, number, prompt, answer)
        places = rng.sample(range(len(text)), min(2, len(text)))
        stop = tuple(text[at : at + rng.randrange(1, 4)] + rng.choice(["", "", "z"]) for at in places)
        cut, stopped = streamed(tokenizer, prompt, answer, stop)
        assert stopped == any(s in text for s in stop)
        assert text.startswith(cut)
        assert not any(s in cut for s in stop)
        assert text[len(cut) :].startswith(stop) if stopped else cut == text


def test_a_stream_continues_the_text_of_the_prompt():
    check_pairs(3_000, seed=1)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_stream_continues_the_text_of_the_prompt_however_drawn(seed):
    check_pairs(10_000, seed)


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "text"),
    [
        ("Metaspace", [], ["a", "<s>", SPACE + "world", "."], "a world."),
        ("Metaspace", ["b"], [SPACE + "world", "."], " world."),
        ("byte fallback", [], ["a", "<|end|>", SPACE + "world", "."], "a world."),
        ("byte fallback", ["b"], [SPACE + "world", "."], " world."),
        ("byte fallback", ["b", "<0xE4>"], ["<0xB8>", "<0x96>"], "世"),
        ("WordPiece", [], ["hello", None, "a", "##s"], "hello as"),
        ("WordPiece", ["hello", "<s>"], ["##ing", "a"], "ing a"),
        ("bytes before Metaspace", ["b"], ["<0xE2>", "<0x96>", "<0x81>"] * 20, " " * 20),
        ("byte-level", ["Ġa"], ["<s>", "Ġa", None, "world"], " aworld"),
    ],
)
def test_spaces_after_special_and_unknown_ids_and_prompts_stay(kind, prompt, answer, text):
    tokenizer, _ = random_tokenizer(kind, random.Random(3))
    ids = {None: 10**6} | tokenizer._tokenizer.get_vocab()
    assert streamed(tokenizer, [ids[t] for t in prompt], [ids[t] for t in answer])[0] == text


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_half_characters_take_linear_time(kind, monkeypatch):
    tokenizer, _ = random_tokenizer(kind, random.Random(0))
    half = tokenizer._tokenizer.get_vocab()["<0xE4>" if kind == "byte fallback" else LETTER_OF[0xE4]]
    joined = 0

    def join(self, tokens, original=TokenDecoder.join):
        nonlocal joined
        joined += len(tokens)
        return original(self, tokens)

    monkeypatch.setattr(TokenDecoder, "join", join)
    text, _ = streamed(tokenizer, [], [half] * 6_000)
    assert text == "\ufffd" * 6_000
    assert joined <= 6_000 * 40  # a window has 17 tokens; where it ends in a half character the last 3 are looked at


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "x"), (2, "x"), (3, "xabzz"), (7, "xabzzabzz")])
def test_a_stop_string_does_not_end_an_answer_before_min_tokens(min_tokens, text):
    vocab = {letter: at for at, letter in enumerate("abxz")}
    tokenizer = HFTokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    ids = [vocab[letter] for letter in "xabzzabzzab"]
    stopped = streamed(CheckpointTokenizer(tokenizer, {}, None), [], ids, ("ab",), min_tokens=min_tokens)
    assert stopped == (text, True)

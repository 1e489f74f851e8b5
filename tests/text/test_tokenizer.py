from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxmoe.errors import RequestError
from jaxmoe.text.tokenizer import CheckpointTokenizer, TextStream


def byte_tokenizer(**settings) -> CheckpointTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return CheckpointTokenizer(tokenizer, settings, settings.get("chat_template"))


def byte_fallback_tokenizer() -> CheckpointTokenizer:
    """Characters that are not in the vocabulary go byte by byte, as in Llama 2's tokenizer."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"a": 257, "b": 258, "\u2581": 259}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return CheckpointTokenizer(tokenizer, {}, None)


def run(tokenizer: CheckpointTokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[str, list[str], bool]:
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text):
        parts.append(stream.push(token))
        if stream.stopped:
            return stream.text, parts, True
    parts.append(stream.finish())
    return stream.text, parts, False


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_fallback_tokenizer()])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "\u2581" not in text and "\ufffd" not in text))
def test_pieces_join_to_the_text_however_characters_fall_on_tokens(tokenizer, text):
    whole, parts, _ = run(tokenizer, text)
    assert whole == "".join(parts) == text


@pytest.mark.parametrize("place", range(1, 40))
def test_a_stop_string_ends_the_text_at_the_token_that_completes_it(place):
    stream = TextStream(byte_tokenizer(), ("b",))
    pushed = 0
    for token in byte_tokenizer().encode("a" * (place - 1) + "b" + "a" * 5):
        stream.push(token)
        pushed += 1
        if stream.stopped:
            break
    assert (pushed, stream.text) == (place, "a" * (place - 1))


def test_settings_of_training_in_the_file_are_not_obeyed(tmp_path):
    tokenizer = byte_tokenizer()._tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = CheckpointTokenizer.load(tmp_path, {})
    assert [len(loaded.encode("a" * n)) for n in (2, 9)] == [2, 9]


@settings(max_examples=150, deadline=None)
@given(st.text("abé\n", max_size=40), st.lists(st.text("abé\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    whole, parts, stopped = run(byte_tokenizer(), text, tuple(stop))
    assert whole == "".join(parts)
    assert stopped == any(s in text for s in stop)
    assert not any(s in whole for s in stop)
    assert text.startswith(whole)
    if not stopped:
        assert whole == text


def test_chat_template():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template, eos_token={"content": "</s>"})
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == "<user>hi</s><assistant>"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system messages') }}", "{{ messages.__class__.__mro__ }}", "{% broken"]
)
def test_a_template_that_refuses_or_misbehaves_is_a_request_error(template):
    with pytest.raises(RequestError, match="chat template"):
        byte_tokenizer(chat_template=template).chat([{"role": "user", "content": "hi"}])


def test_no_template_is_a_request_error():
    with pytest.raises(RequestError, match="no chat template"):
        byte_tokenizer().chat([])

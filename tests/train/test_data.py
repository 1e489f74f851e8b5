"""The corpus, the tokenizer, the windows."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.train.data import batches, evaluation_batches
from scripts.demo_corpus import HELD_OUT, SourceFile, num_bytes, read_corpus
from scripts.demo_tokenizer import END_OF_TEXT, token_stream, train_tokenizer


@pytest.fixture(scope="module")
def corpus():
    return read_corpus()


def test_held_out_modules_are_not_trained_on(corpus):
    assert {file.name for file in corpus.held_out} == set(HELD_OUT)
    assert not {file.name for file in corpus.training} & set(HELD_OUT)
    trained = {file.text for file in corpus.training}
    assert not any(file.text in trained for file in corpus.held_out)


def test_corpus_is_the_library_itself(corpus):
    names = [file.name for file in corpus.training]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if set(name.split("/")) & {"site-packages", "test", "tests", "idlelib"}]
    assert not [name for name in names if name.startswith("_sysconfigdata")]  # it names the machine that built Python
    assert num_bytes(corpus.training) > 5_000_000
    described = corpus.describe()
    assert described["num_training_files"] == len(names)
    assert "PSF" in str(described["license"])


def test_files_that_are_not_utf8_and_tests_are_left_out(tmp_path):
    for name in (*HELD_OUT, "good.py", "test/bad.py", "pack/tests/bad.py", "empty.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else f"name = {name!r}\n")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9 = 1\n")
    assert [file.name for file in read_corpus(tmp_path).training] == ["good.py"]


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"lacks argparse\.py"):
        read_corpus(tmp_path)


def test_tokenizer_is_deterministic_and_lossless(corpus):
    files = corpus.training[:20]
    one, two = (train_tokenizer(files, vocab_size=400) for _ in range(2))
    assert one.to_str() == two.to_str()
    assert one.get_vocab_size() == 400
    assert one.token_to_id(END_OF_TEXT) == 0
    text = "def f(a, b=12):\n    if a:\n\t\treturn 'é 日本 \U0001f600'\n\n\n"
    assert one.decode(one.encode(text).ids) == text


def test_token_stream_separates_files():
    files = [SourceFile(name="a.py", text="a = 1\n"), SourceFile(name="b.py", text="b = 22\n")]
    tokenizer = train_tokenizer(files, vocab_size=300)
    stream = token_stream(tokenizer, files)
    first, second = np.flatnonzero(stream == 0)[1:]
    assert stream[0] == 0
    assert second == len(stream) - 1
    assert tokenizer.decode(stream[1:first].tolist()) == "a = 1\n"
    assert tokenizer.decode(stream[first + 1 : second].tolist()) == "b = 22\n"


def test_batches_visit_every_window_before_any_again():
    stream = np.arange(1000, dtype=np.int32)
    seen = list(islice(batches(stream, batch_rows=4, window_tokens=10, seed=1), 24))
    assert all(batch.shape == (4, 11) for batch in seen)
    rows = np.concatenate(seen)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(11))
    starts = rows[:96, 0]
    assert len(set(starts)) == 96
    assert len(set(starts % 10)) == 1
    again = list(islice(batches(stream, batch_rows=4, window_tokens=10, seed=1), 24))
    np.testing.assert_array_equal(seen, again)
    other = list(islice(batches(stream, batch_rows=4, window_tokens=10, seed=2), 24))
    assert not np.array_equal(seen, other)


def test_a_corpus_too_small_for_a_batch_is_refused():
    with pytest.raises(ConfigError, match="use fewer rows"):
        next(batches(np.arange(30, dtype=np.int32), batch_rows=4, window_tokens=10, seed=0))


@pytest.mark.parametrize("num_tokens", [2, 11, 12, 81, 95])
def test_evaluation_windows_hold_every_target_once(num_tokens):
    stream = np.arange(100, 100 + num_tokens, dtype=np.int32)
    targets = []
    for tokens, lengths in evaluation_batches(stream, batch_rows=4, window_tokens=10):
        assert tokens.shape == (4, 11)
        for row, length in zip(tokens, lengths, strict=True):
            targets += row[1 : 1 + length].tolist()
    assert targets == stream[1:].tolist()

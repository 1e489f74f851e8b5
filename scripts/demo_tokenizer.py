"""Byte-level BPE tokenizer trained on the corpus. Training is deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.demo_corpus import SourceFile

END_OF_TEXT = "<|endoftext|>"
# Line ends; indentation as one token; a word with its leading space; single digits; runs of punctuation.
_SPLIT = r"\n+|[ ]+(?=[ ])|[ ]?\p{L}+|\p{N}|[ ]?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(files: Sequence[SourceFile], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with END_OF_TEXT as token 0. It encodes and decodes every text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, files: Sequence[SourceFile]) -> np.ndarray:
    """Return the int32 token ids of all files in order, with END_OF_TEXT before the first file and after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoded in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        ids += encoded.ids
        ids.append(end)
    return np.asarray(ids, np.int32)

"""A small byte-level BPE, trained on the corpus; the same text gives the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.demo_corpus import SourceFile

END_OF_TEXT = "<|endoftext|>"
# Ends of lines; indentation in one piece; a word with the blank before it; single digits; runs of signs.
_SPLIT = r"\n+|[ ]+(?=[ ])|[ ]?\p{L}+|\p{N}|[ ]?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(files: Sequence[SourceFile], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with END_OF_TEXT as token 0. Every text can be encoded, and decodes to itself."""
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
    """int32 ids of all files in order, END_OF_TEXT before the first and after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoded in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        ids += encoded.ids
        ids.append(end)
    return np.asarray(ids, np.int32)

"""Text and token ids: tokenizers, incremental detokenization, chat templates, end tokens."""

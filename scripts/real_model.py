"""Compare greedy answers of jaxmoe with those of transformers for a real model. Needs torch, transformers and gguf.

    python -m scripts.real_model DIRECTORY ANSWER.json...

DIRECTORY is the output of scripts.gguf_to_hf. Each file is the output of `jaxmoe generate --json --ignore-eos` for one
of the two prompts below: its name begins with "plain-" or "chat-". transformers reads tensors and tokenizer from the
GGUF file itself, so that the converted checkpoint is checked as well. Exit status: 0 if every token is equal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gguf_to_hf import packaged_model

NUM_TOKENS = 60
PLAIN = "Once upon a time, in a small village by the sea, there lived a clockmaker who"
CHAT = "Give me five tips for learning a language."


MIN_LOGIT_GAP = 1e-3  # far above the change of a logit from another order of summation
_SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """Hold the model that transformers reads from a GGUF file, in float32. tensors: by published name."""

    tokenizer: Any
    model: Any
    tensors: Mapping[str, Any]

    @classmethod
    def load(cls, gguf: Path, directory: Path) -> Oracle:
        """Read tensors and tokenizer from the GGUF file, with the config of the converted checkpoint in directory.

        The config is checked against the config of the GGUF file. (from_pretrained does the same but needs accelerate.)
        Raises: ValueError if configs or tensor names differ.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.initialization import no_init_weights
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        config = AutoConfig.from_pretrained(directory)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
        said, written = read["config"], config.to_dict() | dict(config.rope_parameters)
        for key in _SAME:
            if key in said and not math.isclose(said[key], written[key], rel_tol=1e-7):
                raise ValueError(f"config.json has {key}={written[key]}, transformers reads {said[key]} in {gguf.name}")
        missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"transformers reads {gguf.name} without {missing}, and with {unexpected}")
        model.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return cls(tokenizer, model.eval(), read["tensors"])

    def prompts(self) -> dict[str, list[int]]:
        """Return the token ids of both prompts by name."""
        message = [{"role": "user", "content": CHAT}]
        chat = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return {"plain": self.ids(PLAIN), "chat": self.ids(chat)}

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def difference(self, prompt: list[int], answer: list[int]) -> str | None:
        """Return how an answer differs from greedy decoding, or None if it does not.

        One forward pass without a cache checks that each of NUM_TOKENS tokens is the most likely one after all tokens
        before it.
        Raises: ValueError if a choice is too close to a tie to be the same on another backend.
        """
        import torch

        if len(answer) != NUM_TOKENS:
            return f"{len(answer)} tokens instead of {NUM_TOKENS}"
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
        best = torch.topk(logits[len(prompt) - 1 :], 2)
        gap = float((best.values[:, 0] - best.values[:, 1]).min())
        greedy = best.indices[:, 0].tolist()
        for at, (token, wanted) in enumerate(zip(answer, greedy, strict=True)):
            if token != wanted:
                return f"token {at} is {token}, transformers gives {wanted}"
        if gap < MIN_LOGIT_GAP:
            raise ValueError(f"a logit gap of {gap:.1e} is under {MIN_LOGIT_GAP}: choose another prompt")
        return None


def main() -> int:
    """Compare the files named on the command line."""
    directory, *paths = map(Path, sys.argv[1:])
    oracle = Oracle.load(packaged_model(), directory)
    prompts, num_different = oracle.prompts(), 0
    for path in paths:
        answer = json.loads(path.read_text(encoding="utf-8"))
        why = oracle.difference(prompts[path.name.split("-")[0]], answer["token_ids"])
        num_different += why is not None
        print(f"{path.stem}: {answer['text']!r}")
        print(f"{path.stem}: {why or f'all {NUM_TOKENS} tokens are equal to those of transformers'}")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())

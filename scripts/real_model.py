"""Compare greedy answers of jaxmoe with those of transformers for a real model. Needs torch, transformers and gguf.

    python -m scripts.real_model ANSWER.json...

Each file holds what `jaxmoe generate --json --ignore-eos` wrote for one of the two prompts below: its name begins with
"plain" or "chat". transformers reads tensors and tokenizer from the GGUF file itself, so that the converted checkpoint
is compared as well. Exit status: 0 if every token is equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gguf_to_hf import packaged_model

NUM_TOKENS = 60
PLAIN = "The lighthouse keeper climbed the stairs every evening because"
CHAT = "Explain in a few sentences why the sky is blue during the day and red at sunset."


@dataclass(frozen=True)
class Oracle:
    """transformers' reading of a GGUF file, in float32."""

    tokenizer: Any
    model: Any

    @classmethod
    def load(cls, gguf: Path) -> Oracle:
        """Read the tokenizer and the dequantised model."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        return cls(AutoTokenizer.from_pretrained(**where), model.eval())

    def prompts(self) -> dict[str, list[int]]:
        """Return the token ids of both prompts by name."""
        message = [{"role": "user", "content": CHAT}]
        chat = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return {"plain": self.ids(PLAIN), "chat": self.ids(chat)}

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def greedy(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], float]:
        """Return the likeliest tokens one after another, past any end token, and the least gap of their logits to the
        second best."""
        import torch

        ids, cache, tokens, gap = torch.tensor([prompt]), None, [], float("inf")
        with torch.inference_mode():
            for _ in range(num_tokens):
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                best = torch.topk(output.logits[0, -1], 2)
                gap = min(gap, float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
                ids, cache = best.indices[None, :1], output.past_key_values
        return tokens, gap


def compare(answer: Mapping[str, Any], expected: list[int]) -> str | None:
    """Return what differs between an answer of `jaxmoe generate --json` and the expected tokens, None if nothing."""
    found = list(answer["token_ids"])
    if found == expected:
        return None
    pairs = zip(found, expected, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected)))
    return f"token {at}: jaxmoe {found[at : at + 1]}, transformers {expected[at : at + 1]}"


def main() -> int:
    """Compare files named on the command line."""
    if not sys.argv[1:]:
        raise SystemExit("give the files that jaxmoe generate --json wrote")
    oracle = Oracle.load(packaged_model())
    expected = {name: oracle.greedy(prompt)[0] for name, prompt in oracle.prompts().items()}
    num_different = 0
    for path in map(Path, sys.argv[1:]):
        kind = path.name.split("-")[0].removesuffix(".json")
        if kind not in expected:
            raise SystemExit(f"{path} begins with neither plain nor chat")
        answer = json.loads(path.read_text(encoding="utf-8"))
        why = compare(answer, expected[kind])
        num_different += why is not None
        print(f"{path.stem}: {answer['text']!r}")
        print(f"{path.stem}: {why or f'all {NUM_TOKENS} tokens are those of transformers'}")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())

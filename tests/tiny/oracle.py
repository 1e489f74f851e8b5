"""The reference: transformers, float32, eager, one prompt at a time. Needs torch: `make test` does not import this."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from .cases import NUM_GREEDY_TOKENS, Case
from .checkpoint import checkpoint_sha256
from .golden import Reference


def load_model(directory: Path) -> Any:
    """The checkpoint as a transformers model.

    Raises: ValueError if a tensor of the model is not in the files, or one in the files is not in the model.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    unmatched = {kind: keys for kind, keys in info.items() if keys}
    if unmatched:
        raise ValueError(f"{directory}: checkpoint and model differ: {unmatched}")
    return model.eval()


def reference(case: Case, directory: Path) -> Reference:
    """Results of the checkpoint of `case` in `directory`.

    Greedy decoding runs the whole sequence again for each token, so no cache takes part in it.
    """
    model = load_model(directory)
    last_logits, prompt_logprobs, greedy, logit_gaps, router_gaps = [], [], [], [], []
    with torch.inference_mode(), _one_thread():
        for prompt in case.prompts:
            tokens = list(prompt)
            for step in range(NUM_GREEDY_TOKENS):
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
                if step == 0:
                    last_logits.append(logits[-1].numpy())
                    prompt_logprobs.append(_next_token_logprobs(logits, prompt))
                best = torch.topk(logits[-1], 2)
                logit_gaps.append(float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
            greedy.append(tokens[len(prompt) :])
            router_gaps += _router_gaps(case, model, tokens)
    return Reference(
        checkpoint_sha256=checkpoint_sha256(directory),
        last_logits=np.stack(last_logits),
        prompt_logprobs=tuple(prompt_logprobs),
        greedy=np.array(greedy, np.int32),
        min_logit_gap=min(logit_gaps),
        min_router_gap=min(router_gaps, default=None),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small lose far more time to waking threads than they gain, and one thread sums in one order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _next_token_logprobs(logits: torch.Tensor, prompt: tuple[int, ...]) -> np.ndarray:
    """Logits [T, V] of a prompt of T tokens -> float32 [T - 1]."""
    logprobs = torch.log_softmax(logits[:-1], dim=-1)
    chosen: np.ndarray = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
    return chosen


def _router_gaps(case: Case, model: Any, tokens: list[int]) -> list[float]:
    """For each routed layer, the smallest distance between the last chosen router logit and the first left out."""
    top_k = case.config.get("num_experts_per_tok")
    if top_k is None:
        return []
    outputs = model(input_ids=torch.tensor([tokens]), use_cache=False, output_router_logits=True)
    gaps = []
    for router_logits in outputs.router_logits:  # [T, E]
        ranked = router_logits.sort(dim=-1, descending=True).values
        gaps.append(float((ranked[:, top_k - 1] - ranked[:, top_k]).min()))
    return gaps

"""The reference: transformers, float32, eager, one prompt at a time. Needs torch: `make test` does not import this."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config

from .cases import NUM_GREEDY_TOKENS, Case
from .checkpoint import checkpoint_sha256
from .golden import Reference


def load_model(directory: Path) -> Any:
    """The checkpoint as a transformers model.

    Raises: ValueError if a tensor of the model is not in the files, or one in the files is not in the model.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        config=_config(directory),
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


def _config(directory: Path) -> Any:
    """Kimi-K2 is DeepSeek-V3's architecture under a name that transformers does not know."""
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if raw["model_type"] == "kimi_k2":
        return DeepseekV3Config(**raw | {"model_type": "deepseek_v3"})
    return AutoConfig.from_pretrained(directory)


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
    """For each routed layer, the smallest distance between the last chosen expert's score and that of the first left
    out, and where groups are chosen between the last chosen group's and the next."""
    top_k = case.config.get("num_experts_per_tok")
    if top_k is None:
        return []
    gaps = []
    for router, logits in _router_logits(model, tokens):  # [T, E]
        choice = logits
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            choice = logits.sigmoid() + bias
        groups, chosen = case.config.get("n_group", 1), case.config.get("topk_group", 1)
        if chosen < groups:
            best = 2 if bias is not None else 1
            by_group = choice.view(len(choice), groups, -1)
            scores = by_group.topk(best, dim=-1).values.sum(dim=-1)
            gaps.append(_gap(scores, chosen))
            kept = torch.zeros_like(scores).scatter_(1, scores.topk(chosen, dim=-1).indices, 1).bool()
            choice = by_group.masked_fill(~kept[:, :, None], float("-inf")).view(choice.shape)
        gaps.append(_gap(choice, top_k))
    return gaps


def _gap(scores: torch.Tensor, count: int) -> float:
    ranked = scores.sort(dim=-1, descending=True).values
    return float((ranked[:, count - 1] - ranked[:, count]).min())


def _router_logits(model: Any, tokens: list[int]) -> list[tuple[Any, torch.Tensor]]:
    """Every router of the model, and its logits for a sequence of tokens."""
    found: list[tuple[Any, torch.Tensor]] = []

    def keep(router: Any, _inputs: Any, outputs: Any) -> None:
        found.append((router, outputs[1 if type(router).__name__ == "Llama4Router" else 0]))

    hooks = [
        module.register_forward_hook(keep) for module in model.modules() if type(module).__name__.endswith("Router")
    ]
    model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found

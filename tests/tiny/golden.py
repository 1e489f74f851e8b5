"""The committed reference results, tests/golden/<case>.json. Needs numpy alone; the results come from oracle.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cases import NUM_GREEDY_TOKENS, Case

GOLDEN_DIR = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers computes in float32 from a case's checkpoint. P prompts of T tokens each, vocabulary V.

    checkpoint_sha256: of the very files read.
    last_logits: float32 [P, V], at each prompt's last position.
    prompt_logprobs: P arrays float32 [T - 1]; entry t is log p(prompt[t + 1] | prompt[: t + 1]).
    greedy: int32 [P, NUM_GREEDY_TOKENS], decoded past any end-of-sequence token.
    min_logit_gap: smallest distance of the best logit to the second met while decoding.
    min_router_gap: smallest distance of the last chosen expert's router logit to the next, over every token of prompts
        and greedy tokens; None for a family without experts.
    """

    checkpoint_sha256: str
    last_logits: np.ndarray
    prompt_logprobs: tuple[np.ndarray, ...]
    greedy: np.ndarray
    min_logit_gap: float
    min_router_gap: float | None


def golden_path(case: Case) -> Path:
    return GOLDEN_DIR / f"{case.name}.json"


def load_golden(case: Case) -> Reference:
    """The committed reference of `case`.

    Raises: ValueError if there is none, or if the case has changed since it was taken.
    """
    remedy = f"run python -m scripts.refresh_goldens --case {case.name}"
    path = golden_path(case)
    if not path.exists():
        raise ValueError(f"case {case.name} has no golden; {remedy}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["prompts"] != [list(prompt) for prompt in case.prompts]:
        raise ValueError(f"case {case.name} has other prompts than its golden; {remedy}")
    return Reference(
        checkpoint_sha256=record["checkpoint_sha256"],
        last_logits=np.array(record["last_logits"], np.float32),
        prompt_logprobs=tuple(np.array(row, np.float32) for row in record["prompt_logprobs"]),
        greedy=np.array(record["greedy"], np.int32).reshape(len(case.prompts), NUM_GREEDY_TOKENS),
        min_logit_gap=record["min_logit_gap"],
        min_router_gap=record["min_router_gap"],
    )


def save_golden(case: Case, reference: Reference) -> Path:
    """Write tests/golden/<case>.json, one line an array row; the nine digits kept give back every float32 exactly."""
    record: dict[str, Any] = {
        "checkpoint_sha256": reference.checkpoint_sha256,
        "min_logit_gap": _nine_digits(reference.min_logit_gap),
        "min_router_gap": None if reference.min_router_gap is None else _nine_digits(reference.min_router_gap),
        "prompts": [list(prompt) for prompt in case.prompts],
        "greedy": reference.greedy.tolist(),
        "prompt_logprobs": [[_nine_digits(x) for x in row] for row in reference.prompt_logprobs],
        "last_logits": [[_nine_digits(x) for x in row] for row in reference.last_logits],
    }
    path = golden_path(case)
    path.write_text("{\n" + ",\n".join(f'"{key}": {_lines(value)}' for key, value in record.items()) + "\n}\n")
    return path


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"


def _nine_digits(value: float | np.floating[Any]) -> float:
    return float(f"{float(value):.9g}")

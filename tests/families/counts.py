"""What transformers counts for a config.json: its own model, built without arrays.

`python -m tests.families.counts` (with torch and transformers) writes the counts into configs/published.jsonl, for each
config there that is not refused. `make test` does not import torch: the counts are stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "configs" / "published.jsonl"
_NO_SIZES = ("quantization_config", "auto_map", "model_type", "torch_dtype", "dtype")


def transformers_config(raw: dict[str, Any]) -> Any:
    """Return transformers' config of a config.json: of its text model, without quantization or code of its own.
    Kimi-K2 is DeepSeek-V3's architecture under a name that transformers does not know."""
    from transformers import AutoConfig

    text = raw.get("text_config") or raw
    name = {"kimi_k2": "deepseek_v3"}.get(text["model_type"], text["model_type"])
    return AutoConfig.for_model(name, **{key: value for key, value in text.items() if key not in _NO_SIZES})


def transformers_count(config: Any) -> int:
    """Return the numbers of a checkpoint of transformers' causal language model: its parameters, tied ones once, and
    the bias of the router's choice, which is no parameter there."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(one.numel() for one in (*model.parameters(), *biases))


def main() -> None:
    """Write the counts."""
    rows = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "refused" not in row:
            row["parameters"] = transformers_count(transformers_config(row["config"]))
    order = ("repository", "read_in", "published", "left_out", "parameters", "refused", "config")
    text = "".join(json.dumps({key: row[key] for key in order if key in row}) + "\n" for row in rows)
    PUBLISHED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

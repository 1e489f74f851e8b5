"""jaxmoe score: the log-probability of every token of given sequences."""

from __future__ import annotations

import math

import click

from jaxmoe.cli.options import ModelOptions, load_model, model_options, read_id_lines, start_jax
from jaxmoe.jsontext import json_text

_MIN_MEAN = -700.0  # of logprobs: the perplexity of less is more than a float holds


@click.command()
@click.argument("model")
@click.option("--ids", required=True, metavar="FILE.jsonl", help="one JSON list of token ids a line")
@model_options
@click.option("--json", "as_json", is_flag=True, help="one JSON object a sequence on standard output, nothing else")
def score(model: str, ids: str, options: ModelOptions, as_json: bool) -> None:
    """Log-probability (natural) of each token given those before it, under MODEL."""
    rows = read_id_lines(ids)
    start_jax(options.devices)
    llm = load_model(model, options, quiet=as_json)
    for index, logprobs in enumerate(llm.score(rows)):
        total = float(logprobs.sum())
        if as_json:
            print(json_text({"index": index, "logprobs": logprobs.tolist(), "total": total}), flush=True)
        else:
            mean = total / max(1, len(logprobs))
            perplexity = math.exp(-mean) if mean > _MIN_MEAN else math.inf
            print(f"[{index}] {len(rows[index])} tokens, total {total:.4f}, perplexity {perplexity:.4f}")

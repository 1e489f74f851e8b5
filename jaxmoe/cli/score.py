"""jaxmoe score: compute the log-probability of every token of given sequences."""

from __future__ import annotations

import math

import click

from jaxmoe.cli.options import ModelOptions, load_model, model_options, read_id_lines, start_jax
from jaxmoe.jsontext import json_text

_MIN_MEAN = -700.0  # mean log-probability below which the perplexity overflows a float


@click.command()
@click.argument("model")
@click.option(
    "--ids", required=True, metavar="FILE.jsonl", help="File of sequences, one JSON list of token ids per line."
)
@model_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per sequence on standard output and nothing else."
)
def score(model: str, ids: str, options: ModelOptions, as_json: bool) -> None:
    """Compute the log-probability of each token, given the tokens before it.

    MODEL is a checkpoint directory, a Hugging Face Hub id or a preset. Logarithms are natural.
    """
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

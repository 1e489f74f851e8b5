"""jaxmoe bench: measure the throughput of whole requests."""

from __future__ import annotations

import time

import click
from rich.table import Table

from jaxmoe.cli.options import ModelOptions, load_model, model_options, start_jax
from jaxmoe.jsontext import json_text

_CASES = "1x128x64,8x128x64,32x128x64,32x512x1"


@click.command()
@click.argument("model", required=False)
@click.option(
    "--cases",
    default=_CASES,
    show_default=True,
    help="Cases to run, separated by commas. Each is REQUESTSxPROMPTxNEW: the number of requests, and the prompt "
    "tokens and generated tokens per request.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Number of measured runs per case. The median is reported.",
)
@model_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per case on standard output and nothing else."
)
def bench(model: str | None, cases: str, repeats: int, options: ModelOptions, as_json: bool) -> None:
    """Measure the throughput of MODEL on random token ids, ignoring end tokens. Compile time is reported separately."""
    from jaxmoe.report.bench import parse_cases, run_case

    wanted = parse_cases(cases)
    started = time.perf_counter()
    start_jax(options.devices)
    llm = load_model(model, options, quiet=as_json)
    startup_s = time.perf_counter() - started
    table = Table("case", "seconds", "new tokens/s", "all tokens/s", "compile s")
    for case in wanted:
        result = run_case(llm, case, repeats=repeats, startup_s=startup_s)
        if as_json:
            print(json_text(result.as_json()), flush=True)
        table.add_row(
            result.case,
            f"{result.seconds:.3f}",
            f"{result.new_tok_s:.1f}",
            f"{result.total_tok_s:.1f}",
            f"{result.compile_s:.1f}",
        )
    if not as_json:
        from rich.console import Console

        Console().print(table)
        print(f"loaded in {startup_s:.1f} s; median of {repeats}")

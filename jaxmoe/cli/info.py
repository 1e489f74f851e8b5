"""jaxmoe info: describe a model from its config.json or its checkpoint, reading only the headers of weight files."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import json_option, size_text, table_console
from jaxmoe.jsontext import json_text


@click.command("info")
@click.argument("model")
@engine_option("revision")
@engine_option("ignore_config_keys")
@json_option
def info(model: str, revision: str | None, ignore_config_keys: tuple[str, ...], as_json: bool) -> None:
    """Describe a model from its config.json.

    MODEL is a config.json, a folder that holds one, a preset, or a Hugging Face Hub id, whose config.json is
    downloaded. Print the family, layers, routing, total and active parameters, bytes by part, KV cache bytes per token,
    and quantization. If weight files are next to config.json, bytes are measured from them and their tensors are
    checked against the config.
    """
    from jaxmoe.report.info import model_info
    from jaxmoe.weights.source import find_config

    report = model_info(find_config(model, hub=True, revision=revision), ignore=ignore_config_keys)
    if as_json:
        print(json_text(report), flush=True)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from jaxmoe.planner.sizes import behind_words

    size, parameters = report["bytes"], report["parameters"]
    table = Table(title=f"{report['family']}, {report['dtype']}", title_justify="left")
    table.add_column("part")
    for name in ("parameters", "bytes", "of total"):
        table.add_column(name, justify="right")
    for part, num_bytes in size["by_part"].items():
        share = f"{num_bytes / size['total']:.1%}" if num_bytes is not None and size["total"] else ""
        table.add_row(part, f"{parameters['by_part'].get(part, 0):,}", _size(num_bytes), share)
    table.add_section()
    table.add_row("all", f"{parameters['total']:,}", _size(size["total"]), "")
    table.add_row("active per token", f"{parameters['active']:,}", "", "")
    table.add_row("  without the embedding", f"{parameters['active_without_embedding']:,}", "", "")
    table_console().print(table)
    for note in report["not_understood"]:
        print(f"not understood: {note}")
    print(f"bytes are those of {'the files' if size['measured'] else 'files as the config implies'}; {_format(report)}")
    if report["config_check"] is not None:
        print(f"weights next to config.json: {report['config_check']}")
    print("layers: " + "; ".join(f"{count} {kind}" for kind, count in report["layers"].items()))
    for name in ("attention", "experts"):
        if report[name]:
            print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report[name].items()))
    cached, context = report["kv_bytes_per_token"], report["context"]
    print(f"KV cache: {cached:,} bytes per token in {report['dtype']}")
    print(f"context: {context:,} tokens ({_size(cached * context)}); vocabulary: {report['vocabulary']:,}")
    if report["behind_windows"] is not None:
        print(behind_words(report["behind_windows"]))


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else size_text(num_bytes)


def _format(report: dict[str, Any]) -> str:
    form = report["quantization"]
    if form is None:
        return "not quantized"
    if not form["supported"]:
        kind = f" ({form['dtype']})" if "dtype" in form else ""
        return f"quantized by {form['method']}{kind}, which jaxmoe does not {'run' if kind else 'read'}"
    inputs = "all" if form["inputs_per_scale"] is None else form["inputs_per_scale"]
    scale = f"one scale per {inputs} inputs x {form['outputs_per_scale']} outputs"
    return f"quantized by {form['method']}: {form['dtype']}, {scale}"

"""jaxmoe inspect: show how a model is sharded over a mesh, and its collectives, without loading weights."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.contract import collectives_table, print_differing
from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import (
    console,
    devices_option,
    dispatch_option,
    given_options,
    json_option,
    size_text,
    start_jax,
    table_console,
)
from jaxmoe.jsontext import json_text


@click.command("inspect")
@click.argument("model")
@engine_option("mesh", required=True)
@devices_option
@engine_option("layout")
@engine_option("virtual_stages")
@engine_option("max_num_seqs")
@engine_option("context", default=128, show_default=True)
@engine_option("dtype")
@engine_option("weights_dtype")
@engine_option("kv_dtype")
@dispatch_option()
@engine_option("ignore_config_keys")
@json_option
def inspect_model(model: str, devices: int | None, as_json: bool, **args: Any) -> int:
    """Show how a model is sharded over a mesh of this machine's devices.

    MODEL is a config.json, a folder that holds one, or a preset. No weights are needed. Print the sharding and bytes of
    every parameter. Compile the prefill and decode steps and compare their collectives with the planned ones. Exit with
    1 if collectives differ from the plan.
    """
    start_jax(devices)
    from jaxmoe.aot.request import InspectRequest
    from jaxmoe.report.parameters import report

    request = InspectRequest.of(model, **given_options(args))
    with console.status("preparing") as status:
        result = report(request, lambda phase: status.update(f"compiling {phase}"))
    if as_json:
        print(json_text(result), flush=True)
    else:
        _print(result)
    return 0 if result["as_planned"] else 1


_PARTS = {"device": "per device", "padding": "padding", "head_copies": "head copies", "replicas": "replicas"}
_MEANINGS = {
    "padding": "zeros added so that dims split evenly, counted once per array",
    "head_copies": "repeated key/value heads, counted once per array",
    "replicas": "further copies of arrays, on devices along mesh axes that do not split them",
}


def _print(result: dict[str, Any]) -> None:
    from jaxmoe.planner.sizes import behind_words

    screen = table_console()
    axes = " x ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1) or "one device"
    place = f"{axes} on {result['devices']} {result['platform']} device(s), layout {result['layout']}"
    table = Table(title=f"{result['family']}, {result['dtype']}, {place}", title_justify="left")
    for name in ("parameter", "shape", "split"):
        table.add_column(name, overflow="fold")
    shown = [part for part in _PARTS if result["bytes"][part]]
    for part in shown:
        table.add_column(_PARTS[part], justify="right")
    for one in result["parameters"]:
        split = (f"{dim}: {', '.join(axes)}" for dim, axes in one["sharding"].items() if axes)
        shape = " ".join(map(str, one["shape"]))
        table.add_row(one["path"], shape, "\n".join(split), *(size_text(one["bytes"][part]) for part in shown))
    table.add_section()
    table.add_row("all", "", "", *(size_text(result["bytes"][part]) for part in shown))
    screen.print(table)
    print(f"the model's parameters alone take {size_text(result['bytes']['model'])}")
    for part, meaning in _MEANINGS.items():
        if part in shown:
            print(f"{_PARTS[part]}: {meaning}")
    if result["behind_windows"] is not None:
        print(behind_words(result["behind_windows"]))
    if result["collectives"]:
        screen.print(collectives_table(result["collectives"]))
    if result["steps"]["dtype"] != result["dtype"]:
        print(
            f"steps are compiled in float32: on a CPU the compiler runs every {result['dtype']} collective in float32"
        )
    print_differing(result["collectives"])
    if result["as_planned"]:
        print("prefill and decode: collectives match the plan")

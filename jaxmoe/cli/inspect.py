"""jaxmoe inspect: how a model lies on a mesh, and its collectives, before any weight is read."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.contract import collectives_table, print_differing
from jaxmoe.cli.options import console, size_text, start_jax, table_console
from jaxmoe.jsontext import json_text


@click.command("inspect")
@click.argument("model")
@click.option("--mesh", required=True, help="axes, as in data=2,tensor=2,expert=2, or a preset such as cpu-8")
@click.option("--devices", type=int, help="emulate this many devices on the CPU")
@click.option(
    "--layout",
    help="how mesh axes shard attention and experts: ep-tp (default), tp-ep, dp-ep, tp, with -sp, cp-ep-tp, or parts",
)
@click.option(
    "--virtual-stages", type=int, help="virtual stages of each pipeline stage (interleaved schedule); 1 by default"
)
@click.option("--max-num-seqs", type=int, default=64, show_default=True, help="requests at once, over all devices")
@click.option("--context", type=int, default=128, show_default=True, help="tokens of each request")
@click.option("--dtype", help="of weights and activations; the config's own by default")
@click.option(
    "--weights-dtype",
    help="of matrices: int8, fp8, int8-block, fp8-block, or plain; as the checkpoint has them by default",
)
@click.option("--kv-dtype", help="of cached keys and values: float32, bfloat16, fp8 or int8; as --dtype by default")
@click.option(
    "--dispatch", help="tokens to experts: all_to_all (default), all_gather, ragged_all_to_all, hierarchical[_ragged]"
)
@click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on standard output, nothing else")
def inspect_model(model: str, devices: int | None, as_json: bool, **args: Any) -> int:
    """How the parameters of MODEL (a config.json, a folder with one, or a preset) lie on a mesh of this machine's
    devices, and the collectives of prefill and decode, compiled for them, beside those planned. No weights are needed.
    Exit with 1 if collectives differ from the plan."""
    start_jax(devices)
    from jaxmoe.aot.request import InspectRequest
    from jaxmoe.report.parameters import report

    request = InspectRequest(config=model, **{name: value for name, value in args.items() if value is not None})
    with console.status("preparing") as status:
        result = report(request, lambda phase: status.update(f"compiling {phase}"))
    if as_json:
        print(json_text(result), flush=True)
    else:
        _print(result)
    return 0 if result["as_planned"] else 1


_PARTS = {"device": "on a device", "padding": "padding", "head_copies": "head copies", "replicas": "replicas"}
_MEANINGS = {
    "padding": "zeros that make splits even, of one copy of each array",
    "head_copies": "key/value heads held again, of one copy of each array",
    "replicas": "further copies of arrays, on devices along axes that do not split them",
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
    print(f"the model's own numbers take {size_text(result['bytes']['model'])}")
    for part, meaning in _MEANINGS.items():
        if part in shown:
            print(f"{_PARTS[part]}: {meaning}")
    if result["behind_windows"] is not None:
        print(behind_words(result["behind_windows"]))
    if result["collectives"]:
        screen.print(collectives_table(result["collectives"]))
    if result["steps"]["dtype"] != result["dtype"]:
        print(f"steps are compiled in float32: on a CPU the compiler sends every {result['dtype']} as one")
    print_differing(result["collectives"])
    if result["as_planned"]:
        print("prefill and decode: collectives match the plan")

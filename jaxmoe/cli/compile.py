"""jaxmoe compile: compile a model's steps for a target cluster, without its devices."""

from __future__ import annotations

import math
from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.contract import collectives_table, print_differing
from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import console, dispatch_option, given_options, json_option, table_console
from jaxmoe.jsontext import json_text


@click.command("compile")
@click.argument("model")
@click.option("--target", required=True, help="Target cluster, as in v5p:4x4x8, tpu7x:4x4x4, h200:2x8 or b200:2x8.")
@engine_option("mesh", required=True)
@engine_option("max_num_seqs")
@engine_option("context", default=4096, show_default=True)
@engine_option("chunk_tokens")
@engine_option("dtype")
@engine_option("weights_dtype")
@engine_option("kv_dtype")
@dispatch_option()
@engine_option("layout")
@engine_option("virtual_stages")
@engine_option("ignore_config_keys")
@json_option
def compile_model(as_json: bool, **args: Any) -> int:
    """Compile the prefill and decode steps of a model for a target cluster.

    MODEL is a config.json, a folder that holds one, or a preset. Steps are compiled as AsyncEngine runs them. Neither
    weights nor the target's devices are needed. Print the memory that each device needs, and compare the compiled
    collectives with the planned ones. Exit with 1 if out of memory or if collectives differ from the plan.
    """
    from jaxmoe.aot.fit import CompileRequest, compile_for

    request = CompileRequest.of(**given_options(args))
    with console.status(f"{request.target}: preparing") as status:
        result = compile_for(request, lambda phase: status.update(f"{request.target}: compiling {phase}"))
    if as_json:
        print(json_text(result), flush=True)
    else:
        _print(result)
    return 0 if result["fits"] and result["as_planned"] else 1


def _gib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _print(result: dict[str, Any]) -> None:
    from jaxmoe.planner.sizes import behind_words

    size, screen = result["bytes"], table_console()
    table = Table(title=f"{result['target']}, GiB per device", title_justify="left")
    for name in ("weights", "kv", "temp", "total", "limit"):
        table.add_column(name, justify="right")
    table.add_row(*(_gib(size[name]) for name in ("weights", "kv", "temp", "total", "limit")))
    screen.print(table)
    if result["behind_windows"] is not None:
        print(behind_words(result["behind_windows"]))
    if result["collectives"]:
        screen.print(collectives_table(result["collectives"]))
    print_differing(result["collectives"])
    for phase, part in result["phases"].items():
        if "error" in part:
            print(f"{phase}: {part['error']}")
        if padding := part.get("scatter_padding"):
            print(f"{phase}: the compiler pads reduce-scatters by {padding:.1%} of their bytes")
    if result["fits"]:
        print(f"fits; compiled in {result['compile_seconds']:.0f} s")
    else:
        print(f"does not fit: {_shortage(**size)}")


def _shortage(*, weights: int, kv: int, temp: int | None, total: int | None, limit: int) -> str:
    """Return why the model does not fit, and by which factor the devices are too few, if known."""
    held = weights + kv
    if total is not None:
        lack, devices = f"a device needs {_gib(total)} GiB and has {_gib(limit)}", f"about {_times(total, limit)}"
    else:
        lack, devices = f"weights and pages take {_gib(held)} of the {_gib(limit)} GiB of a device", "more"
        if held > limit:
            devices = f"more than {_times(held, limit)}"
        else:
            lack += ", and the compiler found no room for the rest"
    return (
        f"{lack}; {devices} devices, a smaller --max-num-seqs or --context, "
        f"or a narrower --dtype or --kv-dtype would do"
    )


def _times(needed: int, limit: int) -> str:
    return f"{math.ceil(10 * needed / limit) / 10:.1f} times the"

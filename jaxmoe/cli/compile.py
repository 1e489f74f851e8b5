"""jaxmoe compile: a model's steps by the compiler of a cluster that is not there."""

from __future__ import annotations

import math
from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.contract import collectives_table, print_differing
from jaxmoe.cli.options import console, table_console
from jaxmoe.jsontext import json_text


@click.command("compile")
@click.argument("config")
@click.option("--target", required=True, help="a cluster, as in v5p:4x4x8, tpu7x:4x4x4, h200:2x8 or b200:2x8")
@click.option("--mesh", required=True, help="axes, as in expert=16 or data=4,expert=4,tensor=4")
@click.option("--max-num-seqs", type=int, default=64, show_default=True, help="requests at once, over all devices")
@click.option("--context", type=int, default=4096, show_default=True, help="tokens of each request")
@click.option("--chunk-tokens", type=int, help="of prompts, a step and rank; AsyncEngine's by default")
@click.option("--dtype", help="of weights and activations; the config's own by default")
@click.option(
    "--weights-dtype",
    help="of matrices: int8, fp8, int8-block, fp8-block, or plain; as the checkpoint has them by default",
)
@click.option("--kv-dtype", help="of cached keys and values: float32, bfloat16, fp8 or int8; as --dtype by default")
@click.option(
    "--dispatch", help="tokens to experts: all_to_all (default), all_gather, ragged_all_to_all, hierarchical[_ragged]"
)
@click.option(
    "--layout",
    help="how mesh axes shard attention and experts: ep-tp (default), tp-ep, dp-ep, tp, with -sp, cp-ep-tp, or parts",
)
@click.option(
    "--virtual-stages", type=int, help="virtual stages of each pipeline stage (interleaved schedule); 1 by default"
)
@click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on standard output, nothing else")
def compile_model(as_json: bool, **args: Any) -> int:
    """Compile prefill and decode, as AsyncEngine runs them, of the model of CONFIG (a config.json, a folder with one,
    or a preset) for a target that need not be there: what each device holds, and its collectives beside those
    planned. Exit with 1 if out of memory or if collectives differ from the plan."""
    from jaxmoe.aot.fit import CompileRequest, compile_for

    request = CompileRequest(**{name: value for name, value in args.items() if value is not None})
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
    table = Table(title=f"{result['target']}, GiB of each device", title_justify="left")
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
    """What a device lacks, and by how many times where that is known."""
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
        f"{lack}; {devices} devices, a smaller --max-num-seqs or --context, or a shorter --dtype or --kv-dtype would do"
    )


def _times(needed: int, limit: int) -> str:
    return f"{math.ceil(10 * needed / limit) / 10:.1f} times the"

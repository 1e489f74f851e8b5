"""jaxmoe plan: how to split a model over hardware one need not have, why, and what it will do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.options import console, size_text, table_console
from jaxmoe.cli.plots import check_plot_path, save_plot
from jaxmoe.jsontext import json_text
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.search import OBJECTIVES
from jaxmoe.planner.why import counted, digits

_PHASES = {"prefill": "o", "decode": "^"}  # marks of the roofline


@click.command("plan")
@click.argument("config", metavar="MODEL")
@click.option("--hardware", required=True, help="a preset of meshes/ (h100, b200, gb200, v5p ...) or a TOML file")
@click.option("--nodes", type=int, help="whole nodes of it")
@click.option("--devices", type=int, help="devices of it; without --nodes or this, the fewest that are worthwhile")
@click.option("--isl", type=int, default=1024, show_default=True, help="tokens of a prompt")
@click.option("--osl", type=int, default=1024, show_default=True, help="tokens to generate")
@click.option(
    "--max-num-seqs",
    type=int,
    help="requests at once; by default as many as is best, for latency 4 a device if they fit",
)
@click.option("--objective", type=click.Choice(OBJECTIVES), default="throughput", show_default=True)
@click.option("--sla-ttft-ms", type=float, help="the longest time to the first token")
@click.option("--sla-tpot-ms", type=float, help="the longest time a token")
@click.option("--dtype", help="of activations, and plain weights; the config's own by default")
@click.option(
    "--weights-dtype",
    help="of matrices: int8, fp8, int8-block, fp8-block, or plain; as the checkpoint has them by default",
)
@click.option("--kv-dtype", help="of cached keys and values: float32, bfloat16, fp8 or int8; as --dtype by default")
@click.option("--skew", type=float, default=SKEW, show_default=True, help="how uneven experts' loads are; 0 is even")
@click.option("--price", type=float, help="dollars an hour of a device")
@click.option("--mesh", help="restrict the search to this mesh, as in expert=8")
@click.option("--layout", help="restrict the search to this layout")
@click.option("--dispatch", help="restrict the search to this way of sending tokens to experts")
@click.option("--virtual-stages", type=int, help="price this number of virtual stages a stage alone")
@click.option("--chunk-tokens", type=int, help="restrict the search to so many prompt tokens of a step and rank")
@click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over")
@click.option("--rule-of-thumb", is_flag=True, help="the rule of thumb for memory alone: bits / 8 x parameters x 1.8")
@click.option("--plot", help="a picture of the front, the memory and the roofline, .png or .svg")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on standard output, nothing else")
def plan(rule_of_thumb: bool, plot: str | None, as_json: bool, **args: Any) -> None:
    """What fits, how to split it, why, and what it will serve: MODEL (a config.json, a folder with one, or a preset) on
    hardware that need not be there. Every mesh and layout is priced; the best comes as arguments to paste."""
    from jaxmoe.planner.api import PlanRequest, plan_model, rule_of_thumb_of

    if rule_of_thumb and plot is not None:
        raise click.UsageError("--rule-of-thumb draws nothing: leave --plot out")
    request = PlanRequest(**{name: value for name, value in args.items() if value is not None})
    if plot is not None:
        check_plot_path(plot)
    if rule_of_thumb:
        thumb = rule_of_thumb_of(request)
        for note in [] if as_json else request.not_understood():
            print(f"not understood: {note}")
        print(json_text(thumb) if as_json else _thumb(thumb, request.hardware), flush=True)
        return
    with console.status(f"{request.config} on {request.hardware}: pricing plans"), _uncollected():
        result = plan_model(request)
    if plot is not None:
        save_plot(plot, lambda figure: _draw(figure, result), inches=(15.0, 4.6))
    if as_json:
        print(json_text(result), flush=True)
    else:
        _print(result)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for garbage in cycles, of which a search leaves none: a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _thumb(thumb: dict[str, Any], hardware: str) -> str:
    devices = f"{thumb['devices']} x {hardware}"
    return (
        f"rule of thumb: {thumb['bits']} bits / 8 x {thumb['billions']:,} billion parameters x 1.8 = "
        f"{thumb['gb']:,} GB -> {thumb['devices_gb']:,g} GB = {devices}"
    )


def _print(result: dict[str, Any]) -> None:
    plan, screen = result["plan"], table_console()
    devices = f"{result['devices']} x {result['hardware']}"
    nodes = f" ({counted(result['nodes'], result['node'])})" if result["nodes"] > 1 else ""
    then = "" if plan["tpot_ms"] is None else f", then {plan['tpot_ms']:,.2f} ms a token"
    for note in result["not_understood"]:
        print(f"not understood: {note}")
    print(f"{result['model']} on {devices}{nodes}: {plan['split']}")
    print(f"  {result['arguments']}")
    print(f"  engine: {', '.join(f'{name}={number}' for name, number in result['engine'].items())}")
    print(
        f"  {digits(plan['tokens_per_s'])} tokens/s, {digits(plan['tokens_per_s_per_device'])} a device; "
        f"{digits(plan['tokens_per_s_per_user'])} a user; first token {plan['ttft_ms']:,.0f} ms"
        f"{then}; {counted(plan['max_num_seqs'], 'request')} at once"
    )
    if plan["dollars_per_million_tokens"] is not None:
        print(f"  {digits(plan['dollars_per_million_tokens'])} dollars a million generated tokens")
    print()
    screen.print(_memory_table(result))
    print(_thumb(result["rule_of_thumb"], result["hardware"]) + "\n")
    for reason in result["reasons"]:
        screen.print(f"- {reason}", highlight=False, markup=False)
    print()
    screen.print(_front_table(result))


def _memory_table(result: dict[str, Any]) -> Table:
    memory = result["memory"]
    table = Table(title="memory of a device", title_justify="left")
    for name in ("part", "bytes", "of the device"):
        table.add_column(name, justify="left" if name == "part" else "right")

    def row(name: str, num_bytes: float) -> None:
        table.add_row(name, size_text(num_bytes), f"{num_bytes / memory['limit']:.1%}")

    for part, num_bytes in memory["weights_by_part"].items():
        row(part, num_bytes)
    table.add_section()
    row("weights", memory["weights"])
    row("  padding and copies in them", memory["padding_and_copies"])
    row(f"pages of {counted(result['plan']['max_num_seqs'], 'request')}", memory["pages"])
    for part, num_bytes in memory["step_by_part"].items():
        row(f"a step's {part}", num_bytes)
    row("left", memory["left"])
    table.add_section()
    row("all of the device", memory["limit"])
    table.caption = (
        f"pages: {memory['kv_bytes_per_token']:,.0f} bytes a token; there is room for {memory['pool_tokens']:,} tokens "
        f"over all devices, {counted(memory['max_requests'], 'request')}"
    )
    return table


def _front_table(result: dict[str, Any]) -> Table:
    table = Table(title="Pareto front of latency and throughput", title_justify="left")
    for name in ("split", "arguments", "requests", "first token ms", "ms a token", "tokens/s/device"):
        table.add_column(name, justify="left" if name in ("split", "arguments") else "right")
    for plan in result["front"]:
        words = f"{plan['mesh']} {plan['layout']}" + (
            "" if plan["dispatch"] == "all_to_all" else f" {plan['dispatch']}"
        )
        table.add_row(
            plan["split"], words, f"{plan['max_num_seqs']:,}", f"{plan['ttft_ms']:,.0f}",
            "-" if plan["tpot_ms"] is None else f"{plan['tpot_ms']:,.2f}", digits(plan["tokens_per_s_per_device"]),
        )  # fmt: skip
    return table


def _draw(figure: Any, result: dict[str, Any]) -> None:
    """The front, a device's memory by part, and the roofline."""
    front, memory, roof = figure.subplots(1, 3)
    plans, best = result["front"], result["plan"]
    users = [one["tokens_per_s_per_user"] for one in plans]
    front.plot(users, [one["tokens_per_s_per_device"] for one in plans], "o-", color="tab:blue")
    front.plot(best["tokens_per_s_per_user"], best["tokens_per_s_per_device"], "*", markersize=14, color="tab:orange")
    front.set_xlabel("tokens/s/user")
    front.set_ylabel("tokens/s/device")
    front.set_title(f"{result['model']}, {result['devices']} x {result['hardware']}")
    parts = {
        **result["memory"]["weights_by_part"],
        "pages": result["memory"]["pages"],
        **result["memory"]["step_by_part"],
        "left": result["memory"]["left"],
    }
    base = 0.0
    for place, (name, num_bytes) in enumerate(parts.items()):
        look = {"color": f"C{place % 10}", "hatch": "//" if place >= 10 else None}
        look = {"color": "none", "edgecolor": "gray"} if name == "left" else look
        memory.bar(["a device"], [num_bytes / 2**30], bottom=[base], label=name, **look)
        base += num_bytes / 2**30
    memory.axhline(result["memory"]["limit"] / 2**30, color="black", linestyle="--")
    memory.set_ylabel("GiB")
    memory.set_title("memory")
    memory.set_xlim(-0.5, 1.4)  # beside the bar there is room for its legend
    memory.legend(fontsize=7, loc="center right")
    _draw_roofline(roof, result["roofline"])
    roof.set_title(f"roofline of a device, {best['split']}")


def _draw_roofline(roof: Any, roofline: dict[str, Any]) -> None:
    """Both roofs, as attained and on paper (dotted); a point for each kind of work of both phases."""
    points = roofline["points"]
    reached = [one["flops_per_byte"] for one in points]
    for facts, line in ((roofline, "-"), (roofline["on_paper"], ":")):
        slope, rates = facts["bytes_per_s"], facts["flops_per_s"]
        low, high = min(reached) / 4, 4 * max([*reached, *(rate / slope for rate in rates.values())])
        for rate in set(rates.values()):
            roof.plot([low, rate / slope, high], [low * slope, rate, rate], line, color="black", linewidth=1)
            if line == "-":
                names = ", ".join(name for name, other in rates.items() if other == rate)
                roof.annotate(names, (high, rate), ha="right", va="bottom", fontsize=7)
    ops = list(dict.fromkeys(one["op"] for one in points))
    for one in points:
        marker, color = _PHASES[one["phase"]], f"C{ops.index(one['op'])}"
        label = one["op"] if one["phase"] == "prefill" else None
        roof.plot(one["flops_per_byte"], one["flops_per_s"], marker, color=color, label=label, markerfacecolor="none")
    roof.set_xscale("log")
    roof.set_yscale("log")
    roof.set_xlabel("FLOPs a byte (circles: prefill, triangles: decode)")
    roof.set_ylabel("FLOP/s attained")
    roof.legend(fontsize=6)

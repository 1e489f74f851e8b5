"""jaxmoe plan: find the best way to shard a model over given hardware, and explain and predict its performance."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.table import Table

from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import console, dispatch_option, given_options, json_option, size_text, table_console
from jaxmoe.cli.plots import check_plot_path, save_plot
from jaxmoe.jsontext import json_text
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.launch_lines import placeholders
from jaxmoe.planner.specs import OBJECTIVES
from jaxmoe.planner.why import counted, digits

_MAX_LINES = 8  # launch lines that are printed
_PHASES = {"prefill": "o", "decode": "^"}  # markers of the roofline plot


@click.command("plan")
@click.argument("model")
@click.option("--hardware", required=True, help="Hardware preset of meshes/ (h100, b200, gb200, v5p ...) or TOML file.")
@click.option("--nodes", type=int, help="Number of nodes. All devices of a node are used.")
@click.option(
    "--devices",
    type=int,
    help="Number of devices. Without --nodes and --devices, the planner chooses the fewest that are worthwhile.",
)
@click.option(
    "--isl", type=int, default=1024, show_default=True, help="Input sequence length: prompt tokens per request."
)
@click.option(
    "--osl", type=int, default=1024, show_default=True, help="Output sequence length: generated tokens per request."
)
@engine_option(
    "max_num_seqs",
    default=None,
    help="Maximum number of concurrent requests. By default the planner chooses the best number; with --objective "
    "latency, 4 per device if they fit.",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="throughput",
    show_default=True,
    help="Objective of the search.",
)
@click.option("--sla-ttft-ms", type=float, help="Upper limit of the time to first token (TTFT), in milliseconds.")
@click.option("--sla-tpot-ms", type=float, help="Upper limit of the time per output token (TPOT), in milliseconds.")
@engine_option("dtype")
@engine_option("weights_dtype")
@engine_option("kv_dtype")
@click.option(
    "--skew",
    type=float,
    default=SKEW,
    show_default=True,
    help="Assumed imbalance of expert loads: the exponent by which they fall off from expert to expert. 0 is even.",
)
@click.option("--price", type=float, help="Price of a device, in dollars per hour.")
@engine_option("mesh", help="Restrict the search to this mesh, as in expert=8.")
@engine_option("layout", default=None, help="Restrict the search to this layout.")
@dispatch_option(help="Restrict the search to this dispatch backend.")
@engine_option("virtual_stages", default=None, help="Restrict the search to this number of virtual stages per stage.")
@engine_option(
    "chunk_tokens", default=None, help="Restrict the search to this number of prompt tokens per step and rank."
)
@engine_option("ignore_config_keys")
@click.option(
    "--rule-of-thumb", is_flag=True, help="Print only the rule of thumb for memory: bits / 8 x parameters x 1.8."
)
@click.option("--plot", help="Write a plot of Pareto front, memory and roofline to this .png or .svg file.")
@json_option
def plan(rule_of_thumb: bool, plot: str | None, as_json: bool, **args: Any) -> None:
    """Find the best way to shard a model over given hardware.

    MODEL is a config.json, a folder that holds one, or a preset. The hardware need not be present. Estimate the time
    and memory of every mesh and layout. Print the best plan as arguments for other commands, with its predicted
    performance, its memory, the reasons for it, and the Pareto front of latency and throughput.
    """
    from jaxmoe.planner.api import PlanRequest, plan_model, rule_of_thumb_of

    if rule_of_thumb and plot is not None:
        raise click.UsageError("--rule-of-thumb has no plot: leave --plot out")
    request = PlanRequest.of(**given_options(args))
    if plot is not None:
        check_plot_path(plot)
    if rule_of_thumb:
        thumb = rule_of_thumb_of(request)
        for note in [] if as_json else request.not_understood():
            print(f"not understood: {note}")
        print(json_text(thumb) if as_json else _thumb(thumb, request.hardware), flush=True)
        return
    with console.status(f"{request.model} on {request.hardware}: pricing plans"), _uncollected():
        result = plan_model(request)
    if plot is not None:
        save_plot(plot, lambda figure: _draw(figure, result), inches=(15.0, 4.6))
    if as_json:
        print(json_text(result), flush=True)
    else:
        _print(result)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable the cyclic garbage collector: it takes a fifth of a search's time, and a search leaves no cycles."""
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
    then = "" if plan["tpot_ms"] is None else f", then {plan['tpot_ms']:,.2f} ms per token"
    for note in result["not_understood"]:
        print(f"not understood: {note}")
    print(f"{result['model']} on {devices}{nodes}: {plan['split']}")
    print(f"  {result['arguments']}")
    print(f"  engine: {', '.join(f'{name}={number}' for name, number in result['engine'].items())}")
    print(
        f"  {digits(plan['tokens_per_s'])} tokens/s, {digits(plan['tokens_per_s_per_device'])} per device; "
        f"{digits(plan['tokens_per_s_per_user'])} per user; first token {plan['ttft_ms']:,.0f} ms"
        f"{then}; {counted(plan['max_num_seqs'], 'request')} at once"
    )
    if plan["dollars_per_million_tokens"] is not None:
        print(f"  {digits(plan['dollars_per_million_tokens'])} dollars per million generated tokens")
    _print_launch(result)
    print()
    screen.print(_memory_table(result))
    print(_thumb(result["rule_of_thumb"], result["hardware"]) + "\n")
    for reason in result["reasons"]:
        screen.print(f"- {reason}", highlight=False, markup=False)
    print()
    screen.print(_front_table(result))


def _print_launch(result: dict[str, Any]) -> None:
    """Print the command of every host, or of the first two hosts and the last if there are many."""
    lines = result["launch"]
    if not lines:
        return
    print("  start it:" if len(lines) == 1 else f"  start it on every {result['node']}:")
    shown = lines if len(lines) <= _MAX_LINES else [*lines[:2], "...", lines[-1]]
    for line in shown:
        print(f"    {line}")
    for text in placeholders(lines, result["model"]):
        print(f"    {text}")


def _memory_table(result: dict[str, Any]) -> Table:
    memory = result["memory"]
    table = Table(title="memory per device", title_justify="left")
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
    row("device total", memory["limit"])
    table.caption = (
        f"pages: {memory['kv_bytes_per_token']:,.0f} bytes per token; room for {memory['pool_tokens']:,} tokens "
        f"over all devices, {counted(memory['max_requests'], 'request')}"
    )
    return table


def _front_table(result: dict[str, Any]) -> Table:
    table = Table(title="Pareto front of latency and throughput", title_justify="left")
    for name in ("split", "arguments", "requests", "first token ms", "ms per token", "tokens/s/device"):
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
    """Draw the Pareto front, the memory of a device by part, and the roofline."""
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
    memory.set_xlim(-0.5, 1.4)  # leave room for the legend to the right of the bar
    memory.legend(fontsize=7, loc="center right")
    _draw_roofline(roof, result["roofline"])
    roof.set_title(f"roofline of a device, {best['split']}")


def _draw_roofline(roof: Any, roofline: dict[str, Any]) -> None:
    """Draw the attainable roofline, the nominal one (dotted), and a point for each op of prefill and decode."""
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
    roof.set_xlabel("FLOPs per byte (circles: prefill, triangles: decode)")
    roof.set_ylabel("FLOP/s attained")
    roof.legend(fontsize=6)

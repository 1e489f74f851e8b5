"""jaxmoe balance: measure the expert load of every rank, and balance it by placing experts (EPLB)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from jaxmoe.cli.options import (
    MODEL_OPTION_NAMES,
    ModelOptions,
    console,
    json_option,
    load_model,
    model_options,
    read_id_lines,
    start_jax,
)
from jaxmoe.cli.plots import check_plot_path, save_plot
from jaxmoe.errors import ConfigError, RequestError
from jaxmoe.jsontext import json_text

if TYPE_CHECKING:
    import numpy as np

    from jaxmoe.api.llm import LLM
    from jaxmoe.parallel.eplb import Algorithm

_BAR = 12  # characters
_FORMS = ("before", "planned", "after")


@click.command()
@click.argument("model", required=False)
@model_options
@click.option(
    "--prompt-ids",
    metavar="FILE.jsonl",
    help="File of prompts to run, one JSON list of token ids per line. Defaults to a few sample prompts.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Number of tokens to generate per prompt.",
)
@click.option(
    "--redundant-experts",
    type=int,
    default=0,
    show_default=True,
    help="Number of redundant expert replicas per layer, beyond one replica of each expert.",
)
@click.option(
    "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Number of nodes that the ranks are on."
)
@click.option(
    "--groups",
    type=click.IntRange(1),
    help="Number of expert groups; each group is placed inside one node. Defaults to the model's, or to 1 on one node "
    "or with --loads.",
)
@click.option(
    "--algorithm",
    default="distinct",
    show_default=True,
    help="Placement algorithm: distinct (no two replicas of an expert on one rank) or eplb (as published by DeepSeek).",
)
@click.option(
    "--loads",
    metavar="FILE.json",
    help="File of token counts [layer][expert]. Plan a placement for them without running a model.",
)
@click.option("--ranks", type=click.IntRange(1), help="Number of expert parallel ranks. Use with --loads.")
@click.option("--plot", metavar="FILE", help="Write a plot of the load of every rank, as .png or .svg.")
@json_option
def balance(
    model: str | None, options: ModelOptions, prompt_ids: str | None, max_tokens: int, redundant_experts: int,
    nodes: int, groups: int | None, algorithm: Algorithm, loads: str | None, ranks: int | None, plot: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure and balance the expert load of every rank (EPLB).

    Count the tokens that MODEL routes to each expert, place the experts accordingly, and count again. Experts move
    between steps without recompilation. With --loads, only plan the placement.
    """
    from jaxmoe.parallel.eplb import check_algorithm

    check_algorithm(algorithm)
    if plot is not None:
        check_plot_path(plot)
    if (loads is None) != (ranks is None):
        raise RequestError("--loads and --ranks must be given together: give both, or a model and neither of them")
    if loads is not None and ranks is not None:
        given = [name for name in (*MODEL_OPTION_NAMES, "model", "prompt_ids", "max_tokens") if _was_given(name)]
        if given:
            raise RequestError(f"--loads runs no model: leave {', '.join(given)} out")
        report = _planned(_read_loads(loads), redundant_experts, groups or 1, nodes, ranks, algorithm)
    else:
        rows = read_id_lines(prompt_ids) if prompt_ids is not None else None
        start_jax(options.devices)
        llm = load_model(model, options, quiet=as_json, redundant_experts=redundant_experts)
        report = _measured(llm, rows, max_tokens, groups, nodes, algorithm)
    if plot is not None:
        save_plot(plot, lambda figure: _draw(figure, report))
    if as_json:
        print(json_text(report), flush=True)
        return
    Console().print(_table(report))
    print(_in_words(report))
    if plot is not None:
        console.print(f"[dim]the plot of every rank's load is in {plot}[/dim]")


def _was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source is not ParameterSource.DEFAULT


def _read_loads(path: str) -> np.ndarray:
    """Read loads [layer, expert] from a JSON file. Raises: RequestError unless it holds number lists of one length."""
    import numpy as np

    wrong = RequestError(f"{path} must hold one JSON list of numbers in [0, 1e18] per layer, all of one length")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise wrong
    numbers = [value for row in rows for value in row]
    if not all(type(value) in (int, float) and 0 <= value <= 1e18 for value in numbers):
        raise wrong
    if not rows or len({len(row) for row in rows}) != 1:
        raise wrong
    return np.array(rows, np.float64)


def _planned(
    loads: np.ndarray, redundant: int, groups: int, nodes: int, ranks: int, algorithm: Algorithm
) -> dict[str, Any]:
    """Report the load of each rank with experts placed in order, and with the balanced placement."""
    import numpy as np

    from jaxmoe.parallel import eplb as planner

    num_experts = loads.shape[1]
    if not 0 <= redundant <= 15 * num_experts:
        raise ConfigError(f"redundant_experts={redundant} must lie in [0, {15 * num_experts}]")
    if ranks > 16 * num_experts:
        raise ConfigError(f"--ranks {ranks} must lie in [1, {16 * num_experts}], 16 times the {num_experts} experts")
    num_physical_experts = -(-(num_experts + redundant) // ranks) * ranks
    wanted = planner.balance(
        loads,
        num_replicas=num_physical_experts,
        num_groups=groups,
        num_nodes=nodes,
        num_ranks=ranks,
        algorithm=algorithm,
    )
    share = -(-num_experts // ranks)
    padded = np.pad(loads, ((0, 0), (0, share * ranks - num_experts)))
    by_rank = {"before": padded.reshape(len(loads), ranks, share).sum(axis=2), "planned": wanted.rank_loads(loads)}
    return _report(by_rank, wanted, nodes=nodes, groups=groups, algorithm=algorithm)


def _measured(
    llm: LLM, rows: list[list[int]] | None, max_tokens: int, groups: int | None, nodes: int, algorithm: Algorithm
) -> dict[str, Any]:  # fmt: skip
    """Report rank loads measured as loaded, planned from these loads, and measured after experts moved."""
    from jaxmoe.engine.request import SamplingParams
    from jaxmoe.parallel import eplb as planner
    from jaxmoe.report.verify import sample_prompts

    experts, moe = llm._runner.experts, llm.config.moe
    assert moe is not None
    groups = (moe.num_groups if nodes > 1 else 1) if groups is None else groups
    prompts, params = rows or sample_prompts(llm), SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with console.status("counting"):
        before = llm.expert_loads(prompts, params)
        loads = before.by_expert
        wanted = planner.balance(
            loads, num_replicas=experts.num_physical_experts, num_groups=groups, num_nodes=nodes,
            num_ranks=experts.num_ranks,
            algorithm=algorithm,
        )  # fmt: skip
        llm.place_experts(wanted)
        after = llm.expert_loads(prompts, params)
    by_rank = {
        "before": before.by_rank, "planned": wanted.rank_loads(loads), "after": after.by_rank
    }  # fmt: skip
    return _report(by_rank, wanted, nodes=nodes, groups=groups, algorithm=algorithm)


def _report(
    by_rank: dict[str, np.ndarray], wanted: Any, *, nodes: int, groups: int, algorithm: Algorithm
) -> dict[str, Any]:
    from jaxmoe.parallel.eplb import balancedness

    layers, num_experts = wanted.logical_replica_count.shape
    forms = {
        name: {
            "balancedness": balancedness(loads), "by_layer": [balancedness(row[None]) for row in loads],
            "rank_loads": loads.tolist(),
        }
        for name, loads in by_rank.items()
    }  # fmt: skip
    return {
        "layers": layers, "experts": num_experts, "physical_experts": wanted.physical_to_logical_map.shape[1],
        "ranks": wanted.num_ranks,
        "nodes": nodes, "groups": groups, "hierarchical": nodes > 1 and groups % nodes == 0,
        "algorithm": algorithm, **forms,
        "placement": {"physical_to_logical_map": wanted.physical_to_logical_map.tolist(),
        "logical_replica_count": wanted.logical_replica_count.tolist()},
    }  # fmt: skip


def _table(report: dict[str, Any]) -> Table:
    forms = [name for name in _FORMS if name in report]
    table = Table("MoE layer", *forms, title="balancedness: mean rank load / largest rank load")
    for layer in range(report["layers"]):
        shares = [report[name]["by_layer"][layer] for name in forms]
        table.add_row(str(layer), *(f"{share:.3f} {'█' * round(share * _BAR):<{_BAR}}" for share in shares))
    return table


def _in_words(report: dict[str, Any]) -> str:
    forms = ", ".join(f"{name} {report[name]['balancedness']:.3f}" for name in _FORMS if name in report)
    nodes, groups, placed = report["nodes"], report["groups"], ""
    if nodes > 1:
        placed = f"; each group of experts is inside one of {nodes} nodes"
        if not report["hierarchical"]:
            placed = (
                f"; experts may be on any of {nodes} nodes, because {groups} expert groups do not divide among them"
            )
    return (
        f"{report['experts']} experts in {report['physical_experts']} expert slots on {report['ranks']} ranks; "
        f"balancedness (mean rank load / largest rank load, 1 is even): {forms}{placed}"
    )


def _draw(figure: Any, report: dict[str, Any]) -> None:
    """Draw one panel per form: layers down, ranks across, load relative to the layer's mean as color."""
    import numpy as np

    forms = [name for name in _FORMS if name in report]
    relative: dict[str, Any] = {}
    for name in forms:
        loads = np.array(report[name]["rank_loads"], float)
        relative[name] = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)
    highest = max(2.0, *(float(part.max()) for part in relative.values()))
    for panel, name in zip(figure.subplots(1, len(forms), sharey=True, squeeze=False)[0], forms, strict=True):
        image = panel.imshow(relative[name], aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        panel.set_title(f"{name}: balancedness {report[name]['balancedness']:.3f}")
        panel.set_xlabel("rank")
    figure.axes[0].set_ylabel("MoE layer")
    figure.colorbar(image, ax=figure.axes, label="load / mean load of the layer")

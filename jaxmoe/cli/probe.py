"""jaxmoe probe: measure this machine's devices and links, and write a hardware file for the planner."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from jaxmoe.cli.options import console, devices_option, json_option, size_text, start_jax, table_console
from jaxmoe.cli.plots import check_plot_path, save_plot
from jaxmoe.errors import MeshError, RequestError
from jaxmoe.jsontext import json_text
from jaxmoe.paths import expanded

if TYPE_CHECKING:
    from jaxmoe.probe.probe import ProbePoint, ProbeResult


@click.command()
@devices_option
@click.option(
    "--mesh", help="Mesh axes to measure along, as in data=2,tensor=4. By default groups of every size are measured."
)
@click.option("--name", help="Name of the hardware in the file. Defaults to the device kind that JAX reports.")
@click.option("--max-mib", type=float, default=64, show_default=True, help="Size of the largest message, in MiB.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of measured runs per program. The median is used.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE.toml",
    default="hardware.toml",
    show_default=True,
    help="Hardware file to write.",
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--plot", metavar="FILE", help="Write a plot of bandwidth by message size, as .png or .svg.")
@json_option
def probe(
    devices: int | None, mesh: str | None, name: str | None, max_mib: float, repeats: int, output: str, force: bool,
    plot: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine's devices and write a hardware file.

    Time collectives by message size and group, matmuls, and memory bandwidth. The results are written as a TOML file
    that jaxmoe plan takes as --hardware. With several processes (one per host), run the command in each of them; the
    links between hosts are then measured, too.
    """
    from jaxmoe.parallel.mesh import parse_mesh

    if plot is not None:
        check_plot_path(plot)
    if name is not None and (not name or not name.isprintable()):
        raise RequestError(f"--name {name!r} must consist of printable characters")
    path = _output_path(output, force=force)
    axes = parse_mesh(mesh) if mesh is not None else None
    if not 0 < max_mib < 1 << 24:
        raise MeshError(f"--max-mib {max_mib:g} must lie above 0 and below {1 << 24}")
    start_jax(devices)
    import jax

    from jaxmoe.planner.hardware_file import hardware_text, write_hardware
    from jaxmoe.probe.probe import probe as measure

    with console.status("preparing") as status:
        result = measure(
            axes=axes, name=name, max_bytes=int(max_mib * (1 << 20)), repeats=repeats, on_progress=status.update
        )
    if jax.process_index() != 0:
        return
    text = hardware_text(result.hardware, axes=result.axes, heading=_heading(result, repeats), notes=result.notes)
    write_hardware(path, text, result.hardware)
    if plot is not None:
        save_plot(plot, lambda figure: _draw(figure, result.points))
    if as_json:
        print(json_text(_as_json(result, path)), flush=True)
    else:
        _print(result, path)


def _output_path(output: str, *, force: bool) -> Path:
    """Return the path to write. Raises: RequestError if it cannot be written, or exists and force is not set."""
    path = expanded(output, "--output", RequestError)
    folder = path.resolve().parent
    if path.suffix != ".toml":
        raise RequestError(f"--output {output!r} must end in .toml")
    if not folder.is_dir():
        raise RequestError(f"--output {output!r}: its folder does not exist")
    if path.is_dir():
        raise RequestError(f"--output {output!r} is a folder: name a file")
    if path.exists() and not force:
        raise RequestError(f"--output {output!r} exists: name another file, or replace it with --force")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(f"--output {output!r}: its folder cannot be written: {error.strerror}") from error
    return path


def _heading(result: ProbeResult, repeats: int) -> list[str]:
    import jax

    from jaxmoe import __version__

    count, hosts = jax.device_count(), jax.process_count()
    kind = jax.devices()[0].device_kind
    where = f"{count} {kind} device{'s' * (count > 1)} in {hosts} process{'es' * (hosts > 1)}"
    return [
        f"{where}, measured by jaxmoe probe ({__version__}, JAX {jax.__version__}).",
        f"Medians of {repeats} runs, all devices active at once; [bytes of the whole message, microseconds].",
        *(f"Left out: {one}" for one in result.left_out),
    ]


def _as_json(result: ProbeResult, path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    facts = {key: value for key, value in vars(result.hardware).items() if not key.startswith("collectives")}
    return {
        "file": str(path), "hardware": facts | {key: dict(facts[key]) for key in ("tflops", "attained")},
        "tflops": dict(result.rates.tflops), "hbm_gbps": result.rates.hbm_gbps, "not_measured": dict(result.notes),
        "left_out": list(result.left_out), "collectives": [asdict(one) | {"gbps": one.gbps} for one in result.points],
    }  # fmt: skip


def _print(result: ProbeResult, path: Path) -> None:
    screen = table_console()
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in result.rates.tflops.items())
    print(f"per device: matmuls {rates} Tflop/s; memory {result.rates.hbm_gbps:g} GB/s")
    if result.points:
        screen.print(_table(result.points))
    elif not result.left_out:
        print("one device: there are no collectives to measure")
    for one in result.left_out:
        print(f"left out: {one}")
    for key, note in result.notes.items():
        print(f"{key}: {note}")
    print(f"{path} describes this hardware")


def _series(points: Sequence[ProbePoint]) -> dict[tuple[str, str, int, str], list[ProbePoint]]:
    """Group points into one series per (op, axis, ranks, span)."""
    series: dict[tuple[str, str, int, str], list[ProbePoint]] = {}
    for one in points:
        series.setdefault((one.op, one.axis, one.ranks, one.span), []).append(one)
    return series


def _table(points: Sequence[ProbePoint]) -> Table:
    table = Table(title="microseconds by size of the whole message; GB/s of the largest message", title_justify="left")
    sizes = sorted({one.num_bytes for one in points})
    shown = sizes[:: max(1, len(sizes) // 4)] if len(sizes) > 6 else sizes
    shown = sorted({*shown, sizes[-1]})
    for name in ("collective", "axis", "ranks", "of nodes"):
        table.add_column(name, overflow="fold")
    for name in (*map(size_text, shown), "GB/s"):
        table.add_column(name, justify="right")
    for (op, axis, ranks, span), line in _series(points).items():
        us = {one.num_bytes: f"{one.us:,.4g}" if one.us < 1e4 else f"{one.us:,.0f}" for one in line}
        cells = (us.get(size, "") for size in shown)
        table.add_row(op, axis, str(ranks), span, *cells, f"{line[-1].gbps:.3g}")
    return table


def _draw(figure: Any, points: Sequence[ProbePoint]) -> None:
    """Draw one panel per op: bytes across, GB/s up, one line per group."""
    ops: list[str] = list(dict.fromkeys(one.op for one in points)) or ["no collectives"]
    panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
    for panel, op in zip(panels, ops, strict=True):
        for (name, axis, ranks, span), line in _series(points).items():
            if name == op:
                label = f"{axis}={ranks}" + ("" if span == "inside" else f", {span} nodes")
                panel.plot([one.num_bytes for one in line], [one.gbps for one in line], marker=".", label=label)
        panel.set_title(op)
        if points:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.legend()
        panel.set_xlabel("bytes")
    panels[0].set_ylabel("GB/s of the message")

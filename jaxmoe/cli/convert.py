"""jaxmoe convert: convert a published checkpoint to Orbax and back, or verify a converted one by its checksums."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.markup import escape

from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import console, join_processes, json_option, loading_bar, process_options
from jaxmoe.errors import RequestError, listed
from jaxmoe.jsontext import json_text
from jaxmoe.paths import expanded


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", required=False)
@click.option("--to", help="Format to write: orbax or hf (safetensors). Defaults to the one that SRC does not have.")
@click.option(
    "--mesh",
    help="Mesh axes or preset whose devices will read whole chunks of the Orbax checkpoint. Any other mesh can load "
    "it, too.",
)
@click.option(
    "--weights-dtype",
    help="Dtype to write: float32, bfloat16 or float16 casts (and dequantizes) weights; int8, fp8 or fp8-block "
    "quantizes the weight matrices. By default every tensor is copied bit for bit.",
)
@click.option(
    "--ram-gib",
    type=float,
    default=4.0,
    show_default=True,
    help="Memory that the conversion may use in each process, in GiB.",
)
@click.option("--verify", is_flag=True, help="Verify SRC (if it was converted) and DST by their checksums.")
@engine_option("revision")
@engine_option("ignore_config_keys")
@process_options
@json_option
def convert(
    source: str, destination: str | None, to: str | None, mesh: str | None, weights_dtype: str | None, ram_gib: float,
    verify: bool, revision: str | None, ignore_config_keys: tuple[str, ...], as_json: bool,
) -> int:  # fmt: skip
    """Convert the checkpoint SRC to the new directory DST.

    SRC is a checkpoint directory, a Hugging Face Hub id or a preset. Tensors are streamed slice by slice and copied bit
    for bit. A conversion that was killed resumes when the same command is run again. Several processes (jaxmoe launch,
    or --coordinator) share the work; DST lies on a file system that all of them see. With --verify and no DST, compare
    SRC with the checksums that were recorded when it was written, and exit with 1 if it differs.
    """
    from jaxmoe.parallel.processes import joined
    from jaxmoe.weights.convert import convert as run
    from jaxmoe.weights.source import find_model

    if destination is None and not verify:
        raise RequestError("DST is missing: name a new directory, or pass --verify to check SRC")
    join_processes(with_jax=False)
    directory = find_model(source, revision=revision)
    if destination is None:
        if given := [
            name for name, value in (("--to", to), ("--mesh", mesh), ("--weights-dtype", weights_dtype)) if value
        ]:
            raise RequestError(f"without DST nothing is written: leave {', '.join(given)} out, or name DST")
        return _verify(directory, as_json)
    wanted = expanded(destination, "DST", RequestError)
    group = joined()
    of_first = "" if group is None else f" of process 0 of {group.num_processes}"
    with loading_bar(f"converting {directory.name}{of_first and f', part{of_first}'}", show=not as_json) as on_progress:
        report = run(
            directory, wanted, to=to, mesh=mesh, weights_dtype=weights_dtype, ram_gib=ram_gib,
            verify=verify, ignore_config_keys=ignore_config_keys, on_progress=on_progress, group=group,
        )  # fmt: skip
    if as_json:
        print(json_text(report.as_json() | {"bytes_per_second": report.num_bytes / report.seconds}), flush=True)
        return 0
    resumed = f" ({report.resumed_tensors} were converted before)" if report.resumed_tensors else ""
    print(
        f"{report.destination}: {report.num_tensors} tensors{resumed}, {report.num_bytes / 2**20:.1f} MiB in "
        f"{report.seconds:.1f} s ({report.num_bytes / 2**20 / report.seconds:.0f} MiB/s), {report.kind}"
    )
    print(
        f"memory{of_first}: buffers {report.buffer_bytes / 2**20:.0f} MiB of {report.budget_bytes / 2**20:.0f}, "
        f"peak resident {report.peak_rss_bytes / 2**20:.0f} MiB, "
        f"{report.rss_before_bytes / 2**20:.0f} before the conversion"
    )
    print(f"config.json: {report.config_check}" + ("; checksums match" if report.verified else ""))
    if report.left_behind:
        console.print(f"[dim]not copied: {escape(listed(report.left_behind, len(report.left_behind)))}[/dim]")
    return 0


def _verify(directory: Path, as_json: bool) -> int:
    from jaxmoe.parallel.processes import joined
    from jaxmoe.weights.division import WorkDivision
    from jaxmoe.weights.verify import in_words, problems

    started, division = time.perf_counter(), WorkDivision(joined())
    with loading_bar(f"verifying {directory.name}", show=not as_json) as on_progress:
        errors = problems(directory, on_progress, division)
    if as_json:
        print(json_text({"source": str(directory), "whole": not errors, "problems": errors}), flush=True)
    elif not errors:
        print(f"{directory}: every tensor and file matches its checksum ({time.perf_counter() - started:.1f} s)")
    if errors:
        click.echo(f"jaxmoe: error: {in_words(directory, errors)}", err=True)
    return 1 if division.from_first(lambda: bool(errors)) else 0

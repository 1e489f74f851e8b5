"""jaxmoe verify: compare a model on every mesh and layout with the same model on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import console, process_options, start_jax, table_console
from jaxmoe.jsontext import json_text

if TYPE_CHECKING:
    from jaxmoe.report.verify import ParityResult


@click.command()
@click.argument("model", required=False)
@process_options
@click.option(
    "--devices", type=int, help="Emulate this many devices on the CPU. By default the machine's devices are used."
)
@click.option(
    "--layout", "layouts", multiple=True, help="Layout to verify. Can be given several times. Defaults to all layouts."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Number of tokens to decode greedily per prompt.",
)
@click.option(
    "--weights-dtype",
    help="Dtype of the weight matrices, as in jaxmoe generate. Defaults to the checkpoint's format.",
)
@engine_option("ignore_config_keys")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per mesh and layout on standard output and nothing else.",
)
def verify(
    model: str | None,
    devices: int | None,
    layouts: tuple[str, ...],
    max_tokens: int,
    weights_dtype: str | None,
    ignore_config_keys: tuple[str, ...],
    as_json: bool,
) -> int:
    """Compare a model on every mesh and layout with the same model on one device.

    MODEL runs in float32 on every data x pipeline x tensor x expert mesh in every layout. Layouts that place the model
    identically on a mesh run once. Exit with 1 if any mesh gives other results than one device, or if no mesh can hold
    the model.
    """
    start_jax(devices)
    import jax

    from jaxmoe.families import read_config
    from jaxmoe.parallel.layouts import LAYOUTS, parse_layout
    from jaxmoe.report.verify import all_meshes, all_trials, verify_trials
    from jaxmoe.weights.checkpoint import read_json
    from jaxmoe.weights.source import DEFAULT_MODEL, find_model

    chosen = [parse_layout(text) for text in layouts or LAYOUTS]
    directory = find_model(DEFAULT_MODEL if model is None else model)
    config = read_config(read_json(directory / "config.json"), ignore=ignore_config_keys)
    trials = all_trials(all_meshes(jax.device_count()), chosen, moe=any(config.moe_layers))
    table = Table(*_AXES, "layout", "greedy tokens equal", "largest logit difference", "")
    ran = same = 0
    with console.status("one device") as status:
        checks = verify_trials(
            directory, trials=trials, max_tokens=max_tokens, weights_dtype=weights_dtype,
            ignore_config_keys=ignore_config_keys,
        )  # fmt: skip
        for number, check in enumerate(checks, 1):
            status.update(f"{number} of {len(trials)}")
            ran, same = ran + (not check.refused), same + check.passed
            table.add_row(*_cells(check))
            if as_json:
                print(json_text(_as_json(check)), flush=True)
    if not as_json:
        table_console().print(table)
        more = f"; {len(trials) - ran} cannot hold this model" if ran < len(trials) else ""
        result = f"{same} of {ran} placements match one device" if ran else "nothing was compared"
        print(f"{result}{more}")
    return 0 if ran and same == ran else 1


_AXES = ("data", "pipeline", "tensor", "expert")


def _cells(check: ParityResult) -> list[str]:
    mesh, layouts = check.trial.mesh, (check.trial.layout, *check.trial.also)
    cells = [*(str(mesh.get(axis, 1)) for axis in _AXES), ", ".join(map(str, layouts))]
    if check.refused:
        return [*cells, "", "", check.refused]
    equal, largest = f"{check.num_equal} of {check.num_tokens}", f"{check.max_logit_error:.2e}"
    return [*cells, equal, largest, "same" if check.passed else "DIFFERENT"]


def _as_json(check: ParityResult) -> dict[str, Any]:
    return {
        "mesh": check.trial.mesh, "layout": str(check.trial.layout), "also": [str(one) for one in check.trial.also],
        "passed": check.passed, "num_tokens": check.num_tokens, "num_equal": check.num_equal,
        "max_logit_error": check.max_logit_error, "refused": check.refused,
    }  # fmt: skip

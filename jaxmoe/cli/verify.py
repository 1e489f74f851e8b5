"""jaxmoe verify: every mesh of a number of devices against one device."""

from __future__ import annotations

import json

import click
from rich.table import Table

from jaxmoe.cli.options import console, start_jax


@click.command()
@click.argument("model", required=False)
@click.option("--devices", type=int, help="emulate this many devices on the CPU; without it, the devices there are")
@click.option(
    "--max-tokens", type=click.IntRange(1, 4096), default=32, show_default=True, help="greedy tokens a prompt"
)
@click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a mesh on standard output, nothing else")
def verify(
    model: str | None, devices: int | None, max_tokens: int, ignore_config_keys: tuple[str, ...], as_json: bool
) -> int:
    """Run MODEL in float32 on every data x pipeline x tensor x expert mesh; exit 1 if any differs from one device."""
    start_jax(devices)
    import jax

    from jaxmoe.engine.verify import all_meshes, verify_meshes
    from jaxmoe.weights.source import DEFAULT_MODEL, find_model

    directory = find_model(DEFAULT_MODEL if model is None else model)
    meshes = all_meshes(jax.device_count())
    table = Table("data", "pipeline", "tensor", "expert", "greedy tokens equal", "largest logit difference", "")
    checks = []
    with console.status("one device") as status:
        found = verify_meshes(directory, meshes=meshes, max_tokens=max_tokens, ignore_config_keys=ignore_config_keys)
        for check in found:
            checks.append(check)
            status.update(f"{len(checks)} of {len(meshes)} meshes")
            axes = [str(check.mesh.get(axis, 1)) for axis in ("data", "pipeline", "tensor", "expert")]
            equal = "" if check.refused else f"{check.num_equal} of {check.num_tokens}"
            largest = "" if check.refused else f"{check.max_logit_error:.2e}"
            table.add_row(*axes, equal, largest, check.refused or ("same" if check.passed else "DIFFERENT"))
            if as_json:
                row = {
                    "mesh": check.mesh, "passed": check.passed, "num_tokens": check.num_tokens,
                    "num_equal": check.num_equal, "max_logit_error": check.max_logit_error,
                    "refused": check.refused,
                }  # fmt: skip
                print(json.dumps(row), flush=True)
    refused = sum(bool(check.refused) for check in checks)
    failed = sum(not check.passed for check in checks) - refused
    if not as_json:
        from rich.console import Console

        Console().print(table)
        ran = len(checks) - refused
        more = f"; {refused} cannot hold this model" if refused else ""
        print(f"{ran - failed} of {ran} meshes give what one device gives{more}")
    return 1 if failed else 0

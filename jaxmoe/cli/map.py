"""jaxmoe map: a model on a mesh as a page, before any weight is read."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from jaxmoe.cli.options import console, size_text
from jaxmoe.jsontext import json_text

if TYPE_CHECKING:
    from jaxmoe.map.data import MapRequest


@click.command("map")
@click.argument("model")
@click.option("--mesh", required=True, help="axes, as in data=4,expert=16, or a preset such as b200-2x8")
@click.option("-o", "--output", help="the page to write, as in map.html; one that is there is replaced")
@click.option(
    "--hardware", help="a preset (b200, v5p, ...) or a TOML file; the mesh preset's or the target's by default"
)
@click.option("--compiled", help="what jaxmoe compile --json printed for the same, to be shown beside the plan")
@click.option("--target", help="compile now, for a cluster as in v5p:4x4x8 or b200:2x8")
@click.option(
    "--layout",
    help="how mesh axes shard attention and experts: ep-tp (default), tp-ep, dp-ep, tp, with -sp, cp-ep-tp, or parts",
)
@click.option(
    "--virtual-stages", type=int, help="virtual stages of each pipeline stage (interleaved schedule); 1 by default"
)
@click.option("--micro-batches", type=int, help="of the timeline of stages at first; the engine's own by default")
@click.option("--max-num-seqs", type=int, default=64, show_default=True, help="requests at once, over all devices")
@click.option("--context", type=int, help="tokens of each request; 4096, or the model's most, by default")
@click.option("--chunk-tokens", type=int, help="of prompts, a step and rank; AsyncEngine's by default")
@click.option("--dtype", help="of weights and activations; the config's own by default")
@click.option(
    "--weights-dtype",
    help="of matrices: int8, fp8, int8-block, fp8-block, or plain; as the checkpoint has them by default",
)
@click.option("--kv-dtype", help="of cached keys and values: float32, bfloat16, fp8 or int8; as --dtype by default")
@click.option("--dispatch", help="tokens to experts: all_to_all (default), ragged_all_to_all or all_gather")
@click.option("--ignore-config-key", "ignore_config_keys", multiple=True, help="a config.json key to pass over")
@click.option("--json", "as_json", is_flag=True, help="the page's data as one JSON object on standard output, no page")
def map_model(model: str, output: str | None, compiled: str | None, as_json: bool, **args: Any) -> None:
    """One page that shows MODEL (a config.json, a folder with one, or a preset) on a mesh that need not be there: what
    every device holds, and which collectives a token's way through the model runs over which links. It needs no network
    and no weights."""
    if as_json == (output is not None):
        raise click.UsageError("--json prints the data, -o writes the page: give one of them")
    if compiled is not None and args["target"] is not None:
        raise click.UsageError("--compiled and --target were both given: show one compiled program")
    from jaxmoe.map.compiled import read_compile_result
    from jaxmoe.map.data import MapRequest, map_data, usual_context
    from jaxmoe.map.page import check_page_path, write_page

    if output is not None:
        check_page_path(output, inputs=[one for one in (model, compiled, args["hardware"]) if one])
    given = {name: value for name, value in args.items() if value is not None}
    given.setdefault("context", usual_context(model, ignore=args["ignore_config_keys"]))
    result = None if compiled is None else read_compile_result(compiled)
    if result is not None and "target" in result:
        given["target"] = result["target"]
    request = MapRequest(config=model, **given)
    request.checked_fabric()  # what is wrong with it is said before anything is compiled
    if result is None and request.target is not None:
        result = _compile(request)
    data = map_data(request, result=result)
    if as_json:
        print(json_text(data), flush=True)
    else:
        assert output is not None
        written, size = write_page(output, data), data["bytes"]
        print(f"{written}: a device holds {size_text(size['weights'])} of weights, {size_text(size['kv'])} of pages")


def _compile(request: MapRequest) -> dict[str, Any]:
    from jaxmoe.aot.fit import CompileRequest, compile_for

    compile_request = CompileRequest(**{one.name: getattr(request, one.name) for one in fields(CompileRequest)})
    with console.status(f"{compile_request.target}: preparing") as status:
        return compile_for(compile_request, lambda phase: status.update(f"{compile_request.target}: compiling {phase}"))

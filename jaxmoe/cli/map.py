"""jaxmoe map: draw a model on a mesh as an HTML page, without loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jaxmoe.cli.engine_options import engine_option
from jaxmoe.cli.options import console, dispatch_option, given_options, size_text
from jaxmoe.jsontext import json_text

if TYPE_CHECKING:
    from jaxmoe.map.data import MapRequest


@click.command("map")
@click.argument("model")
@engine_option("mesh", required=True)
@click.option("-o", "--output", help="HTML page to write, as in map.html. An existing file is replaced.")
@click.option(
    "--hardware",
    help="Hardware preset (b200, v5p, ...) or TOML file. Defaults to the hardware of the target or of the mesh preset.",
)
@click.option("--compiled", help="Output of jaxmoe compile --json for the same request, to compare with the plan.")
@click.option("--target", help="Compile for this cluster now, as in v5p:4x4x8 or b200:2x8.")
@engine_option("layout")
@engine_option("virtual_stages")
@click.option(
    "--micro-batches",
    type=int,
    help="Initial number of micro-batches in the pipeline timeline. Defaults to that of the engine.",
)
@engine_option("max_num_seqs")
@engine_option(
    "context",
    help="Context length of each request, in tokens. Defaults to 4096, or to the model's maximum if that is less.",
)
@engine_option("chunk_tokens")
@engine_option("dtype")
@engine_option("weights_dtype")
@engine_option("kv_dtype")
@dispatch_option()
@engine_option("ignore_config_keys")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the data as one JSON object on standard output; write no page."
)
def map_model(model: str, output: str | None, compiled: str | None, as_json: bool, **args: Any) -> None:
    """Draw a model on a mesh as one HTML page.

    MODEL is a config.json, a folder that holds one, or a preset. The page shows what every device holds, and which
    links each collective uses as a token passes through the model. Neither weights nor the mesh's devices are needed,
    and the page needs no network.
    """
    if as_json == (output is not None):
        raise click.UsageError("--json prints the data, -o writes the page: give one of them")
    if compiled is not None and args["target"] is not None:
        raise click.UsageError("--compiled and --target were both given: show one compiled program")
    from jaxmoe.map.compiled import read_compile_result
    from jaxmoe.map.data import MapRequest, map_data, usual_context
    from jaxmoe.map.page import check_page_path, write_page

    if output is not None:
        check_page_path(output, inputs=[one for one in (model, compiled, args["hardware"]) if one])
    given = given_options(args)
    given.setdefault("context", usual_context(model, ignore=args["ignore_config_keys"]))
    result = None if compiled is None else read_compile_result(compiled)
    if result is not None and "target" in result:
        given["target"] = result["target"]
    request = MapRequest.of(model, **given)
    request.checked_fabric()  # raise errors before anything is compiled
    if result is None and request.target is not None:
        result = _compile(request, request.target)
    data = map_data(request, result=result)
    if as_json:
        print(json_text(data), flush=True)
    else:
        assert output is not None
        written, size = write_page(output, data), data["bytes"]
        print(f"{written}: a device holds {size_text(size['weights'])} of weights, {size_text(size['kv'])} of pages")


def _compile(request: MapRequest, target: str) -> dict[str, Any]:
    from jaxmoe.aot.fit import CompileRequest, compile_for

    compile_request = CompileRequest(model=request.model, engine=request.engine, target=target)
    with console.status(f"{target}: preparing") as status:
        return compile_for(compile_request, lambda phase: status.update(f"{target}: compiling {phase}"))

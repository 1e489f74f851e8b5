"""Compare the plan for a device with the programs that the target clusters' own compilers produce.

python -m scripts.plan_against_compile [--rows 0,1,2] needs the compilers: pip install 'jaxmoe[aot-cuda,aot-tpu]'.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

from jax.sharding import Mesh

from jaxmoe.aot.fit import CompileRequest, compile_for
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import PlannedMesh, device_platform
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.planner.memory import DeviceMemory

# (model, target, mesh, layout, batch, context)
ROWS = [
    ("llama-3.1-8b", "h100:1x8", "tensor=8", "ep-tp", 64, 4096),
    ("llama-3.1-8b", "h200:1x8", "data=8", "ep-tp", 64, 4096),
    ("llama-3.1-8b", "v5e:4x4", "data=2,tensor=8", "ep-tp-sp", 64, 4096),
    ("llama-3.1-70b", "h100:1x8", "pipeline=2,tensor=4", "ep-tp", 32, 4096),
    ("llama-3.1-70b", "v6e:4x8", "pipeline=2,tensor=16", "ep-tp", 64, 4096),
    ("mixtral-8x7b", "h200:1x8", "expert=8", "ep-tp", 64, 4096),
    ("mixtral-8x7b", "h100:1x8", "tensor=8", "tp-ep", 64, 4096),
    ("mixtral-8x22b", "b200:1x8", "expert=4,tensor=2", "ep-tp", 64, 8192),
    ("qwen3-30b-a3b", "h100:2x8", "expert=2,tensor=8", "dp-ep", 128, 4096),
    ("qwen3-30b-a3b", "v5p:2x2x4", "expert=16", "ep-tp", 128, 4096),
    ("qwen3-30b-a3b", "tpu7x:2x2x4", "expert=8,tensor=4", "tp-ep", 128, 4096),
    ("gpt-oss-20b", "h200:1x8", "data=2,expert=4", "ep-tp", 64, 4096),
    ("llama-3.1-405b", "h200:2x8", "pipeline=2,tensor=8", "ep-tp", 32, 8192),
    ("qwen3-235b-a22b", "b200:1x8", "expert=8", "ep-tp", 128, 4096),
]


def compared(model: str, target: str, mesh: str, layout: str, batch: int, context: int) -> dict[str, Any]:
    """Return the planned and compiled bytes of one device, and whether all collectives match the plan."""
    kernels = {"dispatch": "hierarchical"} if layout == "dp-ep" else None
    question = CompileRequest.of(
        model=model, target=target, mesh=mesh, layout=layout, max_num_seqs=batch, context=context, kernels=kernels
    )
    answer = compile_for(question)
    config, machine, axes = question.checked()
    platform = device_platform(machine.device.platform)
    memory = DeviceMemory(
        config, MeshPlacement(mesh=cast("Mesh", PlannedMesh(axes, platform)), layout=parse_layout(layout))
    )
    ranks = memory.placement.num_shards("batch")
    rows = -(-batch // ranks)
    step = memory.step_bytes(question.engine.chunk_tokens + rows, rows)
    pages = memory.kv_bytes_per_token * rows * context
    size = answer["bytes"]
    return {
        "weights": memory.weight_bytes / size["weights"] - 1, "pages": pages / size["kv"] - 1,
        "planned": memory.weight_bytes + pages + step, "compiled": size["total"],
        "temp": size["temp"], "step": step, "as_planned": answer["as_planned"], "seconds": answer["compile_seconds"],
        "collectives": sum(one["planned"] for one in answer["collectives"]),
    }  # fmt: skip


def main() -> int:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="row numbers, as in 0,3; default: all rows")
    options = parser.parse_args()
    chosen = [int(row) for row in options.rows.split(",")] if options.rows else range(len(ROWS))
    print("| model | target, mesh, layout | weights | pages | planned GiB | compiled GiB | total | collectives |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number in chosen:
        model, target, mesh, layout, batch, context = ROWS[number]
        one = compared(model, target, mesh, layout, batch, context)
        total = "-" if one["compiled"] is None else f"{one['planned'] / one['compiled'] - 1:+.1%}"
        compiled = "-" if one["compiled"] is None else f"{one['compiled'] / 2**30:.2f}"
        says = f"{one['collectives']}, all as planned" if one["as_planned"] else "differ"
        print(
            f"| {model} | {target} {mesh} {layout} --max-num-seqs {batch} --context {context} | "
            f"{one['weights']:+.2%} | "
            f"{one['pages']:+.2%} | {one['planned'] / 2**30:.2f} | {compiled} | {total} | {says} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

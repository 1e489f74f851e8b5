"""What would lift what binds a plan: only what is not so already, and what the search has not found worse.

Other splits are no remedy: all were priced. What is left is what was asked: dtypes, requests, limits, devices, links.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxmoe.planner.choose import Plan, limited
from jaxmoe.planner.specs import Question

_WIDE = ("float32", "bfloat16", "float16")


def remedies(question: Question, best: Plan, binds: str, *, more_devices: bool) -> list[str]:
    """What to ask for where one part of a turn binds (cost.Seconds.parts). more_devices: whether the best plan of twice
    the devices is better."""
    found: list[str] = []
    if binds in ("compute", "memory"):
        found += _weights(question, products=binds == "compute")
    if binds == "memory":
        found += _pages(best)
    if binds in ("memory", "launch"):
        found += _requests(question, best)
    if binds in ("link", "scale_out"):
        found += _links(question, binds)
    if binds == "bubble":
        found += _stages(question, best)
    return [*found, *(["more devices"] if more_devices else [])]


def _weights(question: Question, *, products: bool) -> Iterator[str]:
    """Shorter numbers: where products bind, only such as the hardware multiplies faster."""
    config, rates = question.config, question.hardware.tflops
    if config.quantisation is not None:
        return
    if config.published is not None:  # and dequantised
        name = config.published.format.name
        if not products or {"nvfp4": "fp4", "mxfp4": "fp4"}.get(name, name) in rates:
            yield f"weights as they are published (leave out --weights-dtype: {name})"
        return
    if known := [name for name in ("fp8", "int8") if rates.get(name, 0) > rates["bf16"]]:
        yield f"shorter weights (--weights-dtype {known[0]})"
    elif not products:
        yield "shorter weights (--weights-dtype int8)"


def _pages(best: Plan) -> Iterator[str]:
    if best.serving.held.kv_dtype in _WIDE:
        yield "shorter pages (--kv-dtype fp8)"


def _requests(question: Question, best: Plan) -> Iterator[str]:
    """More requests for the same weights and launches, where it is the question that keeps them few."""
    if question.objective == "latency" or best.served.concurrency >= best.most_requests:
        return
    if question.load.concurrency is not None:
        yield f"more requests at once (--concurrency, up to {best.most_requests:,})"
    elif limited(question):
        yield "looser limits, which let more requests in"


def _links(question: Question, binds: str) -> Iterator[str]:
    hardware = question.hardware
    rate = hardware.scale_up_gbps if binds == "link" else hardware.scale_out_gbps
    where = f"inside a {hardware.fabric}" if binds == "link" else f"between {hardware.fabric}s"
    yield f"faster links {where} than {rate:g} GB/s a device"
    if question.axes:
        yield "another mesh (leave out --mesh)"


def _stages(question: Question, best: Plan) -> Iterator[str]:
    """More chunks than the search looks at, where stages have layers for them; fewer stages where some were asked."""
    stages = dict(best.spec.axes)["pipeline"]
    chunks = 2 * best.spec.stage_chunks
    if question.config.num_hidden_layers >= stages * chunks and (chunks > 2 or question.stage_chunks):
        yield f"more chunks a stage (--stage-chunks {chunks})"
    if question.axes:
        yield "fewer stages (--mesh)"

"""List the changes to a request that would improve its plan, each estimated on the plan's own split.

Other splits are not listed: the search has estimated all of them, unless the request fixes the mesh. The changes
concern dtypes, the number of requests, latency limits and virtual stages. Faster links and another mesh are listed if
links or pipeline bubbles are the bottleneck, more devices if a search with twice as many found a better plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxmoe.errors import ConfigError
from jaxmoe.families import FAMILIES, with_weights_dtype
from jaxmoe.families.quantization_reader import with_checkpoint_quantization
from jaxmoe.planner.choose import REL_TOLERANCE, ServingPlan, limited, objective_value
from jaxmoe.planner.search import search
from jaxmoe.planner.specs import SearchRequest

_WIDE = ("float32", "bfloat16", "float16")


def improvements(request: SearchRequest, best: ServingPlan, bottleneck: str, *, more_devices: bool) -> list[str]:
    """Return changes to the request that improve the plan, each with its gain, the largest gain first.

    Gains up to REL_TOLERANCE, the accuracy of the estimates, are omitted. bottleneck: the part of the mean step that
    takes longest, a key of cost.StepTime.parts. more_devices: whether the best plan for twice the devices is better.
    """
    gains = ((words, _gain(request, best, other)) for words, other in _changes(request, best))
    ranked = sorted(((words, gain) for words, gain in gains if gain > REL_TOLERANCE), key=lambda one: -one[1])
    lines = [f"{words}: {_gained(request, gain)}" for words, gain in ranked]
    return [*lines, *_links(request, bottleneck), *(["more devices"] if more_devices else [])]


def _gain(request: SearchRequest, best: ServingPlan, other: SearchRequest) -> float:
    """Return the relative gain in the objective if the same split serves another request; 0 if it cannot."""
    parallelism, workload = best.parallelism, other.workload
    if request.objective == "latency":
        workload = replace(workload, concurrency=best.estimate.concurrency)
    virtual_stages = other.virtual_stages or parallelism.virtual_stages
    same = replace(
        other, axes=dict(parallelism.axes), layout=parallelism.layout, dispatch=parallelism.dispatch,
        virtual_stages=virtual_stages, workload=workload,
    )  # fmt: skip
    try:
        return objective_value(request, best) / objective_value(request, search(same).best) - 1
    except ConfigError:
        return 0.0


def _gained(request: SearchRequest, gain: float) -> str:
    if request.objective == "latency":
        return f"{1 - 1 / (1 + gain):.0%} less time"
    return f"{gain:.0%} more tokens/s" if gain < 1 else f"{1 + gain:.3g} times the tokens/s"


def _changes(request: SearchRequest, best: ServingPlan) -> Iterator[tuple[str, SearchRequest]]:
    """Yield each change in words, with the changed request."""
    yield from _weights(request)
    if best.serving.device_memory.kv_dtype in _WIDE:
        yield "quantized KV cache (--kv-dtype fp8)", replace(request, kv_dtype="fp8")
    yield from _requests(request, best)
    stages, virtual_stages = dict(best.parallelism.axes)["pipeline"], 2 * best.parallelism.virtual_stages
    if stages > 1 and request.config.num_hidden_layers >= stages * virtual_stages:
        yield (
            f"more virtual stages (--virtual-stages {virtual_stages})",
            replace(request, virtual_stages=virtual_stages),
        )


def _weights(request: SearchRequest) -> Iterator[tuple[str, SearchRequest]]:
    """Yield a quantized weight dtype, unless the weights are quantized.

    A dequantized checkpoint's own quantization comes first, then a dtype that the hardware multiplies faster than bf16,
    then int8.
    """
    config, rates = request.config, request.hardware.tflops
    if config.quantization is not None:
        return
    if config.checkpoint_quantization is not None:  # dequantized on request
        name = config.checkpoint_quantization.format.name
        as_stored = with_checkpoint_quantization(config, config.checkpoint_quantization, FAMILIES[config.family].names)
        yield (
            f"quantized weights as in the checkpoint (omit --weights-dtype: {name})",
            replace(request, config=as_stored),
        )
        return
    known = [name for name in ("fp8", "int8") if rates.get(name, 0) > rates["bf16"]]
    name = known[0] if known else "int8"
    yield f"quantized weights (--weights-dtype {name})", replace(request, config=with_weights_dtype(config, name))


def _requests(request: SearchRequest, best: ServingPlan) -> Iterator[tuple[str, SearchRequest]]:
    """Yield a higher concurrency, which amortizes weight reads and launches, if the request limits concurrency."""
    if request.objective == "latency" or best.estimate.concurrency >= best.max_requests:
        return
    if request.workload.concurrency is not None:
        free = replace(request, workload=replace(request.workload, concurrency=None))
        yield f"more concurrent requests (--max-num-seqs, up to {best.max_requests:,})", free
    elif limited(request):
        yield "looser latency limits, which admit more requests", replace(request, ttft_limit=None, tpot_limit=None)


def _links(request: SearchRequest, bottleneck: str) -> Iterator[str]:
    hardware = request.hardware
    if bottleneck in ("link", "scale_out"):
        rate = hardware.scale_up_gbps if bottleneck == "link" else hardware.scale_out_gbps
        where = f"inside a {hardware.fabric}" if bottleneck == "link" else f"between {hardware.fabric}s"
        yield f"faster links {where} than {rate:g} GB/s per device"
    if request.axes and bottleneck in ("link", "scale_out", "bubble"):
        yield "another mesh, since only the given one was estimated (omit --mesh)"

"""What would lift a plan: of what was asked for, each change that is not so already, priced on the plan's own split.

Other splits are no remedy: all were priced, unless a mesh was asked for. What is left is dtypes, requests, limits,
virtual stages; and links and devices, where they bind or were looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxmoe.errors import ConfigError
from jaxmoe.families import FAMILIES, with_weights_dtype
from jaxmoe.families.quantization_reader import with_checkpoint_quantization
from jaxmoe.planner.choose import ALIKE, Plan, limited, value
from jaxmoe.planner.search import search
from jaxmoe.planner.specs import Question

_WIDE = ("float32", "bfloat16", "float16")


def remedies(question: Question, best: Plan, binds: str, *, more_devices: bool) -> list[str]:
    """What to ask for, with what it gains, the most first: what gains no more than prices are exact is left out. binds:
    the part of a step that takes longest (cost.Seconds.parts). more_devices: whether the best plan of twice the devices
    is better."""
    gains = ((words, _gain(question, best, other)) for words, other in _changes(question, best))
    ranked = sorted(((words, gain) for words, gain in gains if gain > ALIKE), key=lambda one: -one[1])
    lifts = [f"{words}: {_gained(question, gain)}" for words, gain in ranked]
    return [*lifts, *_links(question, binds), *(["more devices"] if more_devices else [])]


def _gain(question: Question, best: Plan, other: Question) -> float:
    """How much more is served, or how much sooner, of the same split with another question; 0 where it has no room."""
    spec, load = best.spec, other.load
    if question.objective == "latency":
        load = replace(load, concurrency=best.served.concurrency)
    virtual_stages = other.virtual_stages or spec.virtual_stages
    same = replace(
        other, axes=dict(spec.axes), layout=spec.layout, dispatch=spec.dispatch,
        virtual_stages=virtual_stages, load=load,
    )  # fmt: skip
    try:
        return value(question, best) / value(question, search(same).best) - 1
    except ConfigError:
        return 0.0


def _gained(question: Question, gain: float) -> str:
    if question.objective == "latency":
        return f"{1 - 1 / (1 + gain):.0%} less time"
    return f"{gain:.0%} more tokens/s" if gain < 1 else f"{1 + gain:.3g} times the tokens/s"


def _changes(question: Question, best: Plan) -> Iterator[tuple[str, Question]]:
    """Each with the question that it makes."""
    yield from _weights(question)
    if best.serving.held.kv_dtype in _WIDE:
        yield "shorter pages (--kv-dtype fp8)", replace(question, kv_dtype="fp8")
    yield from _requests(question, best)
    stages, virtual_stages = dict(best.spec.axes)["pipeline"], 2 * best.spec.virtual_stages
    if stages > 1 and question.config.num_hidden_layers >= stages * virtual_stages:
        yield (
            f"more virtual stages (--virtual-stages {virtual_stages})",
            replace(question, virtual_stages=virtual_stages),
        )


def _weights(question: Question) -> Iterator[tuple[str, Question]]:
    """Shorter numbers: those published, else those that the hardware multiplies faster, else those it unpacks."""
    config, rates = question.config, question.hardware.tflops
    if config.quantization is not None:
        return
    if config.checkpoint_quantization is not None:  # and dequantized
        name = config.checkpoint_quantization.format.name
        as_stored = with_checkpoint_quantization(config, config.checkpoint_quantization, FAMILIES[config.family].names)
        yield (
            f"weights as the checkpoint has them (leave out --weights-dtype: {name})",
            replace(question, config=as_stored),
        )
        return
    known = [name for name in ("fp8", "int8") if rates.get(name, 0) > rates["bf16"]]
    name = known[0] if known else "int8"
    yield f"shorter weights (--weights-dtype {name})", replace(question, config=with_weights_dtype(config, name))


def _requests(question: Question, best: Plan) -> Iterator[tuple[str, Question]]:
    """More requests for the same weights and launches, where it is the question that keeps them few."""
    if question.objective == "latency" or best.served.concurrency >= best.max_requests:
        return
    if question.load.concurrency is not None:
        free = replace(question, load=replace(question.load, concurrency=None))
        yield f"more requests at once (--max-num-seqs, up to {best.max_requests:,})", free
    elif limited(question):
        yield "looser limits, which let more requests in", replace(question, ttft_limit=None, tpot_limit=None)


def _links(question: Question, binds: str) -> Iterator[str]:
    hardware = question.hardware
    if binds in ("link", "scale_out"):
        rate = hardware.scale_up_gbps if binds == "link" else hardware.scale_out_gbps
        where = f"inside a {hardware.fabric}" if binds == "link" else f"between {hardware.fabric}s"
        yield f"faster links {where} than {rate:g} GB/s a device"
    if question.axes and binds in ("link", "scale_out", "bubble"):
        yield "another mesh, of which none was priced (leave out --mesh)"

"""A plan for a model on hardware one need not have, as `jaxmoe plan --json` prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmoe.config import ModelConfig
from jaxmoe.engine.llm import choose_dtypes
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.families import read_config
from jaxmoe.layouts import parse_layout
from jaxmoe.mesh import parse_mesh
from jaxmoe.ops.dispatch import DISPATCH_KINDS
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.hardware import Hardware, read_hardware
from jaxmoe.planner.pools import Pools, beats, best_pools
from jaxmoe.planner.search import (
    LATENCY_REQUESTS,
    OBJECTIVES,
    Found,
    NoPlanError,
    Objective,
    Plan,
    Question,
    kind_of,
    search,
    value,
)
from jaxmoe.planner.serving import Load
from jaxmoe.planner.sizes import count_parameters
from jaxmoe.planner.why import Neighbours, reasons
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config

_MOST_DEVICES = 8192
_SHORT = {"float8_e4m3fn": ("fp8", "fp8-block"), "int8": ("int8", "int8-block"), "mxfp4": ("mxfp4",)}
_BITS = {"float8_e4m3fn": 8, "int8": 8, "mxfp4": 4}
_NEIGHBOURS_OF_AT_MOST = 64  # devices, beyond which plans for half and twice of them are not looked for


@dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """What is asked: a model (config.json, folder, preset), hardware (preset or TOML), devices, requests.

    nodes, devices: at most one of them; without, the fewest that hold the model and the requests. isl, osl: tokens of
    a prompt and generated. sla_*: limits in milliseconds. price: dollars an hour of a device. The last five fix a part
    of the plan that is searched otherwise.
    """

    config: str
    hardware: str
    nodes: int | None = None
    devices: int | None = None
    isl: int = 1024
    osl: int = 1024
    concurrency: int | None = None
    objective: Objective = "throughput"
    sla_ttft_ms: float | None = None
    sla_tpot_ms: float | None = None
    dtype: str | None = None
    weights_dtype: str | None = None
    kv_dtype: str | None = None
    skew: float = SKEW
    price: float | None = None
    mesh: str | None = None
    layout: str | None = None
    dispatch: str | None = None
    stage_chunks: int | None = None
    chunk_tokens: int | None = None
    ignore_config_keys: tuple[str, ...] = ()

    def checked(self) -> tuple[ModelConfig, Hardware]:
        """The config in the dtypes asked for, and the hardware. Raises: CheckpointError, ConfigError, MeshError,
        LayoutError naming the value, the limit and the remedy."""
        config = read_config(read_json(find_config(self.config)), ignore=self.ignore_config_keys)
        form = config.published.format.dtype if config.published else None
        asked = None if form and self.weights_dtype in _SHORT[form] else self.weights_dtype
        config, dtype = choose_dtypes(config, dtype=self.dtype, weights_dtype=asked, kv_dtype=self.kv_dtype)
        config = replace(config, dtype=dtype)
        if config.indexer is not None:
            raise ConfigError(f"config {self.config!r}: sparse latent attention is sized (jaxmoe info), not planned")
        hardware = read_hardware(self.hardware)
        if self.price is not None:
            hardware = replace(hardware, dollars_an_hour=self.price)
        self._check_numbers(config)
        return config, hardware

    def _check_numbers(self, config: ModelConfig) -> None:
        if self.nodes is not None and self.devices is not None:
            raise MeshError(f"nodes={self.nodes} and devices={self.devices} both say how many: give one of them")
        limits = {
            "nodes": _MOST_DEVICES, "devices": _MOST_DEVICES, "concurrency": 1 << 24, "stage_chunks": 64,
            "chunk_tokens": 1 << 20, "isl": config.max_position_embeddings, "osl": config.max_position_embeddings,
        }  # fmt: skip
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value} must lie in [1, {most}]")
        if self.isl + self.osl > config.max_position_embeddings:
            raise ConfigError(
                f"isl={self.isl} + osl={self.osl} must not exceed max_position_embeddings="
                f"{config.max_position_embeddings}"
            )
        for name in ("sla_ttft_ms", "sla_tpot_ms", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be above 0")
        if not 0 <= self.skew <= 4:
            raise ConfigError(f"skew={self.skew} must lie in [0, 4]")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if self.dispatch is not None and self.dispatch not in DISPATCH_KINDS:
            raise ConfigError(f"dispatch={self.dispatch!r} must be one of {', '.join(DISPATCH_KINDS)}")

    def question(self, config: ModelConfig, hardware: Hardware, devices: int) -> Question:
        """For the search."""
        axes = parse_mesh(self.mesh) if self.mesh else None
        if axes and math.prod(axes.values()) != devices:
            meant = math.prod(axes.values())
            raise MeshError(f"mesh {self.mesh} is of {meant} devices and {devices} are asked for: make them equal")
        return Question(
            config=config, hardware=hardware, devices=devices, objective=self.objective, kv_dtype=self.kv_dtype,
            load=Load(isl=self.isl, osl=self.osl, concurrency=self.concurrency), skew=self.skew, axes=axes,
            ttft_limit=self.sla_ttft_ms / 1e3 if self.sla_ttft_ms else None,
            tpot_limit=self.sla_tpot_ms / 1e3 if self.sla_tpot_ms else None,
            layout=parse_layout(self.layout) if self.layout else None, dispatch=self.dispatch,
            stage_chunks=self.stage_chunks, chunk_tokens=self.chunk_tokens,
        )  # fmt: skip


def plan_model(asked: PlanQuestion) -> dict[str, Any]:
    """The plan, its predictions and reasons, the front, the memory of a device, as `jaxmoe plan --json` prints it.

    Raises: as PlanQuestion.checked, and NoPlanError (a ConfigError) with the devices that would do, or the best
    possible where a limit cannot be met.
    """
    config, hardware = asked.checked()
    question, found = _found(asked, config, hardware)
    best = found.best
    pools = best_pools(question, engine_devices=_engine_devices(best)) if asked.mesh is None else None
    around = _neighbours(asked, question) if asked.mesh is None else Neighbours(half=None, twice=None)
    return {
        "model": asked.config, "family": config.family, "hardware": hardware.device, "devices": question.devices,
        "nodes": -(-question.devices // hardware.devices_per_node), "isl": asked.isl, "osl": asked.osl,
        "objective": asked.objective, "weights_dtype": _weights_dtype(config), "kv_dtype": best.serving.held.kv_dtype,
        "plan": plan_row(best, hardware, config), "arguments": _arguments(asked, best),
        "memory": memory_of(best, hardware), "rule_of_thumb": rule_of_thumb(config, hardware),
        "reasons": reasons(question, found, pools, around),
        "front": [plan_row(plan, hardware, config) for plan in found.front],
        "pools": _pools_row(pools, best, question) if pools else None, "specs_tried": found.tried,
    }  # fmt: skip


def _found(asked: PlanQuestion, config: ModelConfig, hardware: Hardware) -> tuple[Question, Found]:
    """For the devices asked for, or the fewest that do."""
    given = asked.devices or (asked.nodes * hardware.devices_per_node if asked.nodes else None)
    if given is None and asked.mesh:
        given = math.prod(parse_mesh(asked.mesh).values())
    if given is None and hardware.nodes > 1:
        given = hardware.nodes * hardware.devices_per_node
    if given is not None:
        if given > _MOST_DEVICES:
            raise MeshError(f"{given} devices of {hardware.device} are asked for; plans are made for {_MOST_DEVICES}")
        question = asked.question(config, hardware, given)
        try:
            return question, search(question)
        except NoPlanError as error:
            if error.lacks != "room" or asked.mesh:
                raise
            least = _least(asked, config, hardware, above=given)
            more = f"; {least} devices would do" if least else "; no number of them does"
            raise NoPlanError(f"{error}{more}, or a shorter --weights-dtype or --kv-dtype") from error
    least = _least(asked, config, hardware, above=0)
    if least is None:
        raise NoPlanError(
            f"{asked.config} fits on no number of {hardware.device} up to {_MOST_DEVICES}: a shorter --weights-dtype "
            f"or --kv-dtype, or fewer tokens, may do"
        )
    return _worthwhile(asked, config, hardware, least)


def _worthwhile(asked: PlanQuestion, config: ModelConfig, hardware: Hardware, least: int) -> tuple[Question, Found]:
    """The fewest devices as good as any number of them up to a node: those that hold the weights and little else serve
    far less each."""
    tried: list[tuple[Question, Found]] = []
    missed: NoPlanError | None = None
    devices = least
    while devices <= max(2 * least, hardware.devices_per_node):
        question = asked.question(config, hardware, devices)
        try:
            tried.append((question, search(question)))
        except NoPlanError as error:
            missed = error
        devices *= 2
    if not tried:
        assert missed is not None
        raise missed

    best = min(value(question, found.best) for question, found in tried)
    return next((question, found) for question, found in tried if value(question, found.best) <= 1.1 * best)


def _least(asked: PlanQuestion, config: ModelConfig, hardware: Hardware, *, above: int) -> int | None:
    """The fewest devices, doubled from one, that hold the model and the requests asked for (else one)."""
    devices = 1
    while devices <= _MOST_DEVICES:
        if devices > above:
            question = replace(
                asked.question(config, hardware, devices), ttft_limit=None, tpot_limit=None, chunk_tokens=512,
                stage_chunks=1, dispatch="all_to_all", objective="throughput",
            )  # fmt: skip
            try:
                search(question)
                return devices
            except NoPlanError:
                pass
        devices *= 2
    return None


def _engine_devices(best: Plan) -> int:
    sizes = dict(best.spec.axes)
    return best.devices // sizes["data"] if sizes["data"] > 1 else max(1, best.devices // 2)


def _neighbours(asked: PlanQuestion, question: Question) -> Neighbours:
    def best(devices: int) -> Plan | None:
        if not 1 <= devices <= _NEIGHBOURS_OF_AT_MOST or devices == question.devices:
            return None
        load = question.load
        if question.objective == "latency" and load.concurrency is None:  # the same requests, not as many a device
            load = replace(load, concurrency=LATENCY_REQUESTS * question.devices)
        try:
            return search(replace(question, devices=devices, load=load)).best
        except NoPlanError:
            return None

    return Neighbours(half=best(question.devices // 2), twice=best(question.devices * 2))


def plan_row(plan: Plan, hardware: Hardware, config: ModelConfig) -> dict[str, Any]:
    """One plan and what it is predicted to serve."""
    spec, served = plan.spec, plan.served
    dollars = hardware.dollars_an_hour
    return {
        "split": kind_of(spec, moe=config.moe is not None), "mesh": spec.mesh, "layout": str(spec.layout),
        "dispatch": spec.dispatch, "stage_chunks": spec.stage_chunks, "chunk_tokens": spec.chunk_tokens,
        "concurrency": served.concurrency, "most_requests": plan.most_requests, "ttft_ms": served.ttft * 1e3,
        "tpot_ms": served.tpot * 1e3, "tokens_per_s_per_user": 1 / served.tpot,
        "tokens_per_s_per_device": plan.tokens_a_second / plan.devices, "tokens_per_s": plan.tokens_a_second,
        "turn_ms": {name: value * 1e3 for name, value in served.turn.parts().items()},
        "dollars_per_million_tokens":
            None if dollars is None else plan.devices * dollars / 3600 / plan.tokens_a_second * 1e6,
    }  # fmt: skip


def memory_of(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """Bytes of one device: weights by part at their own width, padding and copies in them, pages of the plan's
    requests, what a step needs, what is left; and how many tokens and requests have room."""
    held, serving, served = plan.serving.held, plan.serving, plan.served
    rows = max(1, -(-served.concurrency // serving.ranks))
    tokens = serving.pool_tokens(rows)
    return {
        "weights_by_part": dict(held.weights_by_part), "weights": held.weight_bytes,
        "padding_and_copies": held.weight_bytes - held.unpadded_bytes,
        "kv_bytes_a_token": held.kv_bytes_a_token, "pages": tokens * held.kv_bytes_a_token,
        "step": serving.step_bytes(rows), "limit": hardware.hbm_bytes, "pool_tokens": int(tokens) * serving.ranks,
        "most_requests": plan.most_requests,
    }  # fmt: skip


def rule_of_thumb(config: ModelConfig, hardware: Hardware) -> dict[str, Any]:
    """bits / 8 x billions of parameters x 1.8 GB, on the next of 1, 2, 4, 8 devices (then whole nodes, doubled)."""
    form = config.published or config.quantisation
    bits = _BITS[form.format.dtype] if form else 32 if config.dtype == "float32" else 16
    billions = round(count_parameters(config).total / 1e9)
    needed = round(bits / 8 * billions * 1.8)
    devices = 1
    while devices * hardware.hbm_gb < needed:
        devices *= 2
    return {
        "bits": bits, "billions": billions, "gb": needed, "devices": devices, "devices_gb": devices * hardware.hbm_gb,
    }  # fmt: skip


def rule_of_thumb_of(asked: PlanQuestion) -> dict[str, Any]:
    """The same of a question. Raises: as PlanQuestion.checked."""
    return rule_of_thumb(*replace(asked, isl=1, osl=1).checked())  # of no load


def _weights_dtype(config: ModelConfig) -> str:
    return config.quantisation.format.dtype if config.quantisation else config.dtype


def _arguments(asked: PlanQuestion, best: Plan) -> str:
    """Options of a command that runs the plan."""
    spec, words = best.spec, []
    words.append(f"--mesh {spec.mesh}")
    if str(spec.layout) != "ep-tp":
        words.append(f"--layout {spec.layout}")
    if spec.dispatch != "all_to_all":
        words.append(f"--dispatch {spec.dispatch}")
    if spec.stage_chunks > 1:
        words.append(f"--stage-chunks {spec.stage_chunks}")
    words += [f"--{name.replace('_', '-')} {value}" for name in ("weights_dtype", "kv_dtype")
              if (value := getattr(asked, name))]  # fmt: skip
    return " ".join(words)


def _pools_row(pools: Pools, best: Plan, question: Question) -> Mapping[str, Any]:
    return {
        "engine_devices": pools.engine_devices, "prefill_engines": pools.prefill_engines,
        "decode_engines": pools.decode_engines, "prefill_mesh": pools.prefill.mesh,
        "prefill_layout": str(pools.prefill.layout), "decode_mesh": pools.decode.mesh,
        "decode_layout": str(pools.decode.layout), "concurrency": pools.concurrency, "ttft_ms": pools.ttft * 1e3,
        "tpot_ms": pools.tpot * 1e3, "transfer_ms": pools.transfer * 1e3, "tokens_per_s": pools.tokens_a_second,
        "better": beats(pools, best, question),
    }  # fmt: skip

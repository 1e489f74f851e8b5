"""Plan a model on given hardware, which need not be present, as `jaxmoe plan --json` prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from jaxmoe.config import EngineConfig, EngineOptions, ModelConfig
from jaxmoe.config.engine import split_options
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.families import read_config
from jaxmoe.families.dtypes import choose_dtypes, is_checkpoint_format
from jaxmoe.ops.registry import REGISTRY
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import parse_mesh
from jaxmoe.parallel.stages import check_virtual_stages
from jaxmoe.planner.choose import REL_TOLERANCE, ServingPlan, objective_value
from jaxmoe.planner.cost import SKEW
from jaxmoe.planner.hardware import HardwareSpec, names_nodes, read_hardware
from jaxmoe.planner.launch_lines import launch_lines
from jaxmoe.planner.pools import best_disaggregated
from jaxmoe.planner.roofline import roofline
from jaxmoe.planner.rows import (
    arguments_of,
    disaggregated_row,
    engine_of,
    memory_of,
    plan_row,
    rule_of_thumb,
    weights_dtype_of,
)
from jaxmoe.planner.search import LATENCY_REQUESTS, NoPlanError, SearchResult, missed, search, servings_of
from jaxmoe.planner.serving import RequestWorkload
from jaxmoe.planner.specs import OBJECTIVES, Objective, SearchRequest, candidates_of
from jaxmoe.planner.why import NeighborPlans, UnmetLimit, reasons
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config, model_name
from jaxmoe.weights.stored import read_stored_config

_PLANNED_ONLY = (
    "Planned only: generate, inspect, compile and map do not support this model, so no command takes these arguments."
)
_FIXABLE = (
    "mesh", "layout", "virtual_stages", "kernels", "max_num_seqs", "chunk_tokens", "dtype", "weights_dtype", "kv_dtype",
    "ignore_config_keys",
)  # fmt: skip
_MAX_DEVICES = 8192
_MAX_NUMBER = 1e12  # milliseconds, dollars per hour
_NEIGHBORS_OF_AT_MOST = 64  # devices; plans for half and twice as many are not searched beyond it
_WORTHWHILE = 0.1  # tolerated loss of throughput per device, or of latency, to use fewer devices; not for cost
_TRIED_AT_MOST = 256  # devices, if their number is not given and latency limits are not met


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Describe a model, hardware, devices and requests to plan for.

    model: config.json, folder or preset. hardware: preset or TOML file. nodes, devices: give at most one of them; by
    default the planner chooses the fewest that are worthwhile. isl, osl: prompt tokens and generated tokens. sla_*:
    latency limits in milliseconds. price: dollars per hour of a device. fixed: options of EngineConfig by name, None
    like one left out. A mesh, layout, kernels={"dispatch": ...}, virtual_stages, chunk_tokens or max_num_seqs fixes a
    part of the plan that is searched otherwise.
    Raises: ConfigError as EngineConfig.with_options, or for an option that a plan does not have.
    """

    model: str
    hardware: str
    fixed: EngineOptions = field(default_factory=EngineOptions)
    nodes: int | None = None
    devices: int | None = None
    isl: int = 1024
    osl: int = 1024
    objective: Objective = "throughput"
    sla_ttft_ms: float | None = None
    sla_tpot_ms: float | None = None
    skew: float = SKEW
    price: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.fixed.items() if value is not None}
        checked = EngineConfig().with_options(given).options()
        for name in given:
            if name not in _FIXABLE:
                raise ConfigError(f"a plan does not read {name}: leave it out; its options are {', '.join(_FIXABLE)}")
        kernels = given.get("kernels", {})
        if not isinstance(kernels, Mapping) or set(kernels) - {"dispatch"}:
            raise ConfigError(
                f"kernels={kernels!r:.60} must name the backend of dispatch alone, as in {{'dispatch': 'all_gather'}}: "
                f"a plan is the same for all backends of other ops"
            )
        object.__setattr__(self, "fixed", cast("EngineOptions", {name: checked[name] for name in given}))

    @classmethod
    def of(cls, model: str, hardware: str, **options: Any) -> Self:
        """Return the request for a model on hardware.

        options: Fields of the request, and options of EngineConfig by their own names, which replace those of `fixed`.
        Raises: ConfigError for a value out of range or an unknown name.
        """
        own, others = split_options(cls, options)
        fixed = cast("EngineOptions", {**own.pop("fixed", {}), **others})
        return cls(model=model, hardware=hardware, fixed=fixed, **own)

    @property
    def axes(self) -> dict[str, int] | None:
        """Return the sizes of the axes of the fixed mesh, None if there is none. Raises: MeshError."""
        mesh = self.fixed.get("mesh")
        return None if mesh is None else parse_mesh(mesh)

    @property
    def dispatch(self) -> str | None:
        """Return the fixed backend of dispatch, None if there is none."""
        return dict(self.fixed.get("kernels", {})).get("dispatch")

    def checked(self) -> tuple[ModelConfig, HardwareSpec]:
        """Return the config in the requested dtypes, and the hardware.

        Raises: CheckpointError, ConfigError, MeshError or LayoutError naming the value, the limit and the remedy.
        """
        config, _ = self._read()
        config, dtype = choose_dtypes(
            config, dtype=self.fixed.get("dtype"), weights_dtype=self.fixed.get("weights_dtype"),
            kv_dtype=self.fixed.get("kv_dtype"),
        )  # fmt: skip
        config = replace(config, dtype=dtype)
        hardware = read_hardware(self.hardware)
        self._check_numbers(config)
        if self.price is not None:
            hardware = replace(hardware, dollars_per_hour=self.price)
        return config, hardware

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the keys of config.json to ignore."""
        return tuple(self.fixed.get("ignore_config_keys", ()))

    def _read(self) -> tuple[ModelConfig, list[str]]:
        """Read the config, and list unknown settings as "key = value". Raises: CheckpointError, ConfigError."""
        notes: list[str] = []
        path = find_config(self.model)
        return read_stored_config(path, ignore=self.ignored, planned=True, not_understood=notes), notes

    def not_understood(self) -> list[str]:
        """Return "key = value" of each setting of config.json that the plan ignores. Raises: as checked."""
        return self._read()[1]

    def runs(self) -> bool:
        """Return whether other commands support the model, too, or only the planner. Raises: CheckpointError."""
        raw = read_json(find_config(self.model))
        try:
            return read_config(raw, ignore=self.ignored).indexer is None
        except ConfigError:  # which reading with planned=True tolerates
            return False

    def _check_numbers(self, config: ModelConfig) -> None:
        if self.nodes is not None and self.devices is not None:
            raise MeshError(f"nodes={self.nodes} and devices={self.devices} both set a number of devices: give one")
        limits = {
            "nodes": _MAX_DEVICES, "devices": _MAX_DEVICES, "max_num_seqs": 1 << 24, "virtual_stages": 64,
            "chunk_tokens": 1 << 20, "isl": config.max_position_embeddings, "osl": config.max_position_embeddings,
        }  # fmt: skip
        values: dict[str, Any] = vars(self) | dict(self.fixed)
        for name, most in limits.items():
            value = values.get(name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value} must lie in [1, {most}]")
        if self.isl + self.osl > config.max_position_embeddings:
            raise ConfigError(
                f"isl={self.isl} + osl={self.osl} must not exceed max_position_embeddings="
                f"{config.max_position_embeddings}"
            )
        for name in ("sla_ttft_ms", "sla_tpot_ms", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MAX_NUMBER:
                raise ConfigError(f"{name}={value} must be above 0, and at most {_MAX_NUMBER:g}")
        if not 0 <= self.skew <= 4:
            raise ConfigError(f"skew={self.skew} must lie in [0, 4]")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if self.dispatch is not None and self.dispatch not in REGISTRY["dispatch"]:
            raise ConfigError(f"dispatch={self.dispatch!r} must be one of {', '.join(REGISTRY['dispatch'])}")
        if self.dispatch is not None and config.moe is None:
            raise ConfigError(
                f"dispatch={self.dispatch} sends tokens to experts, but {config.family} has no experts: leave it out"
            )
        virtual_stages, axes = self.fixed.get("virtual_stages"), self.axes
        if virtual_stages is not None and axes is not None:
            check_virtual_stages(virtual_stages, stages=axes["pipeline"])

    def dtypes(self, config: ModelConfig) -> dict[str, str | None]:
        """Return the requested dtypes by option. weights-dtype is None if it is the checkpoint's own format."""
        weights = self.fixed.get("weights_dtype")
        weights = None if is_checkpoint_format(config, weights) else weights
        return {"dtype": self.fixed.get("dtype"), "weights-dtype": weights, "kv-dtype": self.fixed.get("kv_dtype")}

    def search_request(self, config: ModelConfig, hardware: HardwareSpec, devices: int) -> SearchRequest:
        """Return the SearchRequest for a number of devices. Raises: MeshError if the mesh has another number."""
        axes, fixed = self.axes, self.fixed
        if axes and math.prod(axes.values()) != devices:
            meant = math.prod(axes.values())
            raise MeshError(f"mesh {fixed['mesh']} has {meant} devices, but {devices} were requested: make them equal")
        return SearchRequest(
            config=config, hardware=hardware, devices=devices, objective=self.objective, kv_dtype=fixed.get("kv_dtype"),
            workload=RequestWorkload(isl=self.isl, osl=self.osl, concurrency=fixed.get("max_num_seqs")), skew=self.skew,
            axes=axes,
            ttft_limit=self.sla_ttft_ms / 1e3 if self.sla_ttft_ms else None,
            tpot_limit=self.sla_tpot_ms / 1e3 if self.sla_tpot_ms and self.osl > 1 else None,  # no TPOT for one token
            layout=parse_layout(fixed["layout"]) if "layout" in fixed else None, dispatch=self.dispatch,
            virtual_stages=fixed.get("virtual_stages"), chunk_tokens=fixed.get("chunk_tokens"),
        )  # fmt: skip


def plan_model(request: PlanRequest) -> dict[str, Any]:
    """Return the best plan with predictions, reasons, Pareto front and memory, as `jaxmoe plan --json` prints it.

    Raises: as PlanRequest.checked; NoPlanError (a ConfigError) naming a number of devices that suffices, or the best
    possible latency if a limit cannot be met.
    """
    config, hardware = request.checked()
    runs = request.runs()
    search_request, search_result = _search_devices(request, config, hardware)
    best = search_result.best
    disaggregated, around = None, NeighborPlans(half=None, twice=None)
    if request.axes is None:
        latency, most = request.objective == "latency", request.fixed.get("max_num_seqs")
        pool_concurrency = best.estimate.concurrency if latency else most
        disaggregated = best_disaggregated(
            search_request, engine_devices=_engine_devices(best), concurrency=pool_concurrency
        )
        around = _neighbors(search_request, best)
    arguments = arguments_of(best, request.dtypes(config), ignored=request.ignored)
    engine = engine_of(best, search_request)
    return {
        "model": model_name(request.model), "config": request.model, "family": config.family,
        "not_understood": request.not_understood(),
        "hardware": hardware.device, "devices": search_request.devices,
        "nodes": -(-search_request.devices // hardware.devices_per_node),
        "node": "host" if hardware.platform == "tpu" else "node", "isl": request.isl, "osl": request.osl,
        "objective": request.objective, "weights_dtype": weights_dtype_of(config),
        "kv_dtype": best.serving.device_memory.kv_dtype, "plan": plan_row(best, hardware, config),
        "arguments": arguments, "engine": engine,
        "launch": [] if not runs else launch_lines(
            request.model, f"{arguments} --max-num-seqs {engine['max_num_seqs']}", devices=search_request.devices,
            hardware=hardware,
        ),
        "memory": memory_of(best, search_request),
        "rule_of_thumb": rule_of_thumb(config, hardware),
        "reasons": [*reasons(search_request, search_result, disaggregated, around),
                    *([] if runs else [_PLANNED_ONLY])],
        "front": [plan_row(plan, hardware, config) for plan in search_result.front],
        "disaggregated": disaggregated_row(disaggregated, best, search_request) if disaggregated else None,
        "roofline": roofline(best.serving, search_request.workload, concurrency=best.estimate.concurrency),
        "candidates_tried": search_result.tried,
    }  # fmt: skip


def _search_devices(
    request: PlanRequest, config: ModelConfig, hardware: HardwareSpec
) -> tuple[SearchRequest, SearchResult]:
    """Search with the requested number of devices, or with the fewest that are worthwhile."""
    given = request.devices or (request.nodes * hardware.devices_per_node if request.nodes else None)
    axes = request.axes
    if given is None and axes is not None:
        given = math.prod(axes.values())
    if given is None and names_nodes(request.hardware):
        given = hardware.nodes * hardware.devices_per_node
    if given is not None:
        if given > _MAX_DEVICES:
            raise MeshError(f"{given} devices of {hardware.device} were requested; the limit is {_MAX_DEVICES}")
        search_request = request.search_request(config, hardware, given)
        try:
            return search_request, search(search_request)
        except NoPlanError as error:
            if error.failure != "room" or axes is not None:
                raise
            least = _least(request, config, hardware, above=given)
            suggestions = [
                *([f"{least} devices would do"] if least else []),
                *([f"fewer requests (--max-num-seqs, at most {error.most})"] if error.most else []),
                f"a shorter --weights-dtype or --kv-dtype{'' if least else ' may do'}",
            ]
            raise NoPlanError(f"{error}; {', or '.join(suggestions)}", failure="room") from error
    least = _least(request, config, hardware, above=0)
    if least is None:
        raise NoPlanError(
            f"{request.model} fits on no number of {hardware.device} up to {_MAX_DEVICES}: a shorter --weights-dtype "
            f"or --kv-dtype, or fewer tokens, may do",
            failure="room",
        )
    return _worthwhile(request, config, hardware, least)


def _worthwhile(
    request: PlanRequest, config: ModelConfig, hardware: HardwareSpec, least: int
) -> tuple[SearchRequest, SearchResult]:
    """Search with the smallest number of devices that comes within tolerance of the best objective up to a node.

    Devices that hold the weights and little else serve far fewer tokens each. If latency limits are not met, more
    devices are tried while that reduces the latency.
    """
    tried: list[tuple[SearchRequest, SearchResult]] = []
    errors: list[NoPlanError] = []
    devices, usual = least, min(max(2 * least, hardware.devices_per_node), _MAX_DEVICES)
    while devices <= usual or (not tried and devices <= _TRIED_AT_MOST and _nearer(errors)):
        search_request = request.search_request(config, hardware, devices)
        try:
            tried.append((search_request, search(search_request)))
        except NoPlanError as error:
            errors.append(error)
        devices *= 2
    if not tried:
        late = [error for error in errors if error.failure == "latency"]
        if not late:
            raise errors[-1]
        ttft, tpot = min(error.ttft for error in late), min(error.tpot for error in late)
        many = f"any number of {hardware.device} up to {devices // 2}"
        raise NoPlanError(missed(search_request, many, ttft=ttft, tpot=tpot), failure="latency", ttft=ttft, tpot=tpot)
    min_halved = min(_halved(search_request, search_result.best) for search_request, search_result in tried)
    tried = [
        (search_request, search_result)
        for search_request, search_result in tried
        if _halved(search_request, search_result.best) == min_halved
    ]
    best = min(objective_value(search_request, search_result.best) for search_request, search_result in tried)
    alike = REL_TOLERANCE if request.objective == "cost" else _WORTHWHILE
    return next(
        (search_request, search_result)
        for search_request, search_result in tried
        if objective_value(search_request, search_result.best) <= (1 + alike) * best
    )


def _halved(search_request: SearchRequest, best: ServingPlan) -> float:
    """Return assumed requests / requests of the plan. Latencies at different concurrency do not compare."""
    assumed = search_request.objective == "latency" and search_request.workload.concurrency is None
    return LATENCY_REQUESTS * search_request.devices / best.estimate.concurrency if assumed else 1.0


def _nearer(errors: list[NoPlanError]) -> bool:
    """Return whether the last doubling of the devices reduced TTFT or TPOT by more than the tolerance of estimates."""
    if len(errors) < 2 or errors[-1].failure != "latency":
        return True
    before, last = errors[-2:]
    return last.ttft < (1 - REL_TOLERANCE) * before.ttft or last.tpot < (1 - REL_TOLERANCE) * before.tpot


def _least(request: PlanRequest, config: ModelConfig, hardware: HardwareSpec, *, above: int) -> int | None:
    """Return the fewest devices (a power of two) that hold the model and the requested concurrency (else 1)."""
    devices = 1
    while devices <= _MAX_DEVICES:
        if devices > above:
            search_request = request.search_request(config, hardware, devices)
            if not request.dispatch and not request.fixed.get(
                "virtual_stages"
            ):  # other settings need at least as much memory
                search_request = replace(search_request, dispatch="all_to_all", virtual_stages=1)
            if next(servings_of(search_request, candidates_of(search_request)), None) is not None:
                return devices
        devices *= 2
    return None


def _engine_devices(best: ServingPlan) -> int:
    sizes = dict(best.parallelism.axes)
    return best.devices // sizes["data"] if sizes["data"] > 1 else max(1, best.devices // 2)


def _neighbors(search_request: SearchRequest, best: ServingPlan) -> NeighborPlans:
    """Plan for half and twice the devices, with the same concurrency if the objective is latency."""
    workload, plans, unmet = search_request.workload, [], []
    if search_request.objective == "latency":
        workload = replace(workload, concurrency=best.estimate.concurrency)
    for devices in (search_request.devices // 2, search_request.devices * 2):
        other, plan, unmet_limit = replace(search_request, devices=devices, workload=workload), None, None
        if 1 <= devices <= _NEIGHBORS_OF_AT_MOST:
            try:
                plan = search(other).best
            except NoPlanError as error:
                unmet_limit = _unmet_limit(other, error)
        plans.append(plan)
        unmet.append(unmet_limit)
    return NeighborPlans(half=plans[0], twice=plans[1], half_unmet=unmet[0])


def _unmet_limit(search_request: SearchRequest, error: NoPlanError) -> UnmetLimit | None:
    """Return which limit the devices of a request do not meet."""
    if error.failure != "room":
        return "limits" if error.failure == "latency" else None
    alone = replace(search_request, workload=replace(search_request.workload, concurrency=1))
    return "model" if next(servings_of(alone, candidates_of(alone)), None) is None else "requests"


def rule_of_thumb_of(request: PlanRequest) -> dict[str, Any]:
    """Return the rule of thumb for memory. Raises: as PlanRequest.checked."""
    return rule_of_thumb(*replace(request, isl=1, osl=1).checked())  # independent of the workload

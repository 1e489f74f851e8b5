"""Data of the map page as plain values: the sharding of every array, and the collectives of a step by location."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmoe.aot.compile import PHASES, Phase, engine_state, held_bytes, step_bucket
from jaxmoe.aot.request import InspectRequest
from jaxmoe.aot.targets import DEVICES, parse_target
from jaxmoe.config import ModelConfig
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.errors import ConfigError
from jaxmoe.families import read_config
from jaxmoe.map.compiled import check_compile_result, compared
from jaxmoe.map.fabric import DeviceFabric, fabric_of
from jaxmoe.model.attend import PAGE_DIMS
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.mesh import PlannedMesh, preset_names
from jaxmoe.parallel.stages import LayerSegment
from jaxmoe.planner.hardware import HardwareSpec, read_hardware
from jaxmoe.planner.launch_lines import generate_options, launch_lines, placeholders
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.params import parameter_table
from jaxmoe.weights.source import find_config, model_name

_MAX_DEVICES, _MAX_MICRO_BATCHES, _MAX_VIRTUAL_STAGES, _USUAL_CONTEXT = 1024, 64, 8, 4096


@dataclass(frozen=True, kw_only=True)
class MapRequest(InspectRequest):
    """Describe the map to draw.

    hardware: a preset or a TOML file (planner/hardware.py); by default that of the target or of the mesh preset, if
    any. target: the cluster that a program was compiled for. micro_batches: initial number in the pipeline timeline; by
    default the engine's.
    """

    hardware: str | None = None
    target: str | None = None
    micro_batches: int | None = None

    def checked_hardware(self) -> HardwareSpec | None:
        """Return the hardware, if any. Raises: MeshError as read_hardware; ConfigError if the target differs."""
        if self.target is not None:
            target = parse_target(self.target)
            chosen = read_hardware(target.name if self.hardware is None else self.hardware)
            other = chosen.device in DEVICES and chosen.device != target.name
            if other or chosen.platform != target.device.platform:
                raise ConfigError(f"hardware {self.hardware} and target {target} differ: name one of them")
            return chosen
        mesh = self.engine.parallel.mesh
        preset = mesh.strip() if isinstance(mesh, str) and mesh.strip() in preset_names() else None
        name = preset if self.hardware is None else self.hardware
        return None if name is None else read_hardware(name)

    def checked_fabric(self) -> tuple[ModelConfig, dict[str, int], DeviceFabric]:
        """Return the config, the mesh axes, and the fabric that connects the devices.

        Raises: as checked_model and checked_hardware; ConfigError for micro_batches without a pipeline, or more devices
        than can be drawn.
        """
        config, axes = self.checked_model()
        _check_micro_batches(self.micro_batches, axes["pipeline"])
        count = math.prod(axes.values())
        if count > _MAX_DEVICES:
            mesh = self.engine.parallel.mesh
            raise ConfigError(f"mesh {mesh} has {count} devices, the map draws at most {_MAX_DEVICES}")
        shape: tuple[int, ...] = ()
        if self.target is not None and (target := parse_target(self.target)).device.platform == "tpu":
            *outer, last = target.shape
            shape = (*outer, last * target.device.devices_per_chip)
        return config, axes, fabric_of(self.checked_hardware(), count, shape=shape)


def map_data(request: MapRequest, *, result: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the data that the page shows, as `jaxmoe map --json` prints it, without compiling or running a step.

    result: output of `jaxmoe compile --json` for the same request, compared with the plan.
    Raises: as MapRequest.checked_fabric; ConfigError if the result belongs to another request.
    """
    config, axes, fabric = request.checked_fabric()
    kernels = request.chosen_kernels(config, config.dtype, axes, platform=fabric.platform)
    runner = request.runner(config, PlannedMesh(axes, fabric.platform), replace(kernels, layers="scan"))
    if result is not None:
        check_compile_result(result, request, runner, axes)
    sizes = request.sizes
    weights, kv = held_bytes(runner, **sizes)
    steps: dict[str, dict[str, Any]] = {phase: _step(runner, request, phase) for phase in PHASES}
    layout, placement = runner.placement.layout, runner.placement
    return {
        "model": model_name(request.model), "family": config.family, "mesh": axes, "layout": str(layout),
        "shares": {name: list(axes) for name, axes in vars(layout).items() if name != "table"},
        "virtual_stages": placement.virtual_stages, "micro_batches": request.micro_batches,
        "dispatch": runner.kernels.dispatch, "dtype": runner.dtype, "kv_dtype": runner.kv_dtype,
        "weights_dtype": request.engine.weights_dtype or "as in the checkpoint",
        "max_num_seqs": sizes["max_num_seqs"], "context": sizes["context"], "chunk_tokens": sizes["chunk_tokens"],
        **_launch(request, axes), "fabric": fabric.as_json(), "facts": _facts(config),
        "segments": [
            asdict(segment) | {"slots": segment.slots, "virtual_stage_slots": segment.virtual_stage_slots,
            "max_virtual_stages": _max_virtual_stages(segment),
                            "kv_slots": size.kv_slots, "kv_copies": size.kv_copies,
                            "moe": [config.moe_layers[segment.first + block] for block in range(segment.period)]}
            for segment, size in zip(runner.segments, runner.sizes, strict=True)
        ],
        "arrays": [*_parameters(runner), *_pages(runner, request)],
        "pages": {"tokens": sizes["page_size"] * runner.context_ranks, "ranks": runner.num_ranks,
                  "axes": list(placement.axes("page")), "context_axes": list(placement.axes("page_token"))},
        "bytes": {"weights": weights, "kv": kv}, "steps": steps, "collectives": compared(steps, result),
        "compiled": None if result is None else {"target": result.get("target"), "bytes": result["bytes"]},
    }  # fmt: skip


def _launch(request: MapRequest, axes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the command of every host, and the meaning of its placeholders."""
    options = generate_options(request.engine, axes, request.kernels)
    lines = launch_lines(
        request.model, options, devices=math.prod(axes.values()), hardware=request.checked_hardware()
    )  # fmt: skip
    return {"launch": lines, "launch_placeholders": placeholders(lines, model_name(request.model))}


def usual_context(model: str, *, ignore: Iterable[str] = ()) -> int:
    """Return the default context length: the smaller of 4096 and the model's maximum. Raises: as checked_model."""
    most = read_config(read_json(find_config(model)), ignore=ignore).max_position_embeddings
    return min(_USUAL_CONTEXT, most)


def _check_micro_batches(micro_batches: int | None, stages: int) -> None:
    if micro_batches is None:
        return
    if stages == 1:
        raise ConfigError(
            f"micro_batches={micro_batches} needs stages: the mesh has pipeline=1; leave it out or add stages"
        )
    if not 1 <= micro_batches <= _MAX_MICRO_BATCHES:
        raise ConfigError(f"micro_batches={micro_batches} must lie in [1, {_MAX_MICRO_BATCHES}]")


def _max_virtual_stages(segment: LayerSegment) -> int:
    """Return the most virtual stages that the timeline offers: the number in use, or more if the layers allow it."""
    return max(segment.virtual_stages, min(_MAX_VIRTUAL_STAGES, segment.repeats // segment.stages))


def _facts(config: ModelConfig) -> dict[str, int]:
    """Return model sizes, by which the page distinguishes padding from the model's own slices."""
    moe = config.moe
    return {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "vocab": config.vocab_size,
        "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
        "experts": moe.num_experts if moe else 0, "top_k": moe.num_experts_per_tok if moe else 0,
        "latent": int(config.mla is not None),
    }  # fmt: skip


def _parameters(runner: ModelRunner) -> list[dict[str, Any]]:
    """List every parameter, stacked over equal layers: logical dims, global shape, mesh axes that split each dim."""
    model = abstract_model(runner.config, runner.placement, dtype=runner.dtype, kernels=runner.kernels)
    return [
        {"path": info.path, "part": info.part, "times": 1, "dims": list(info.dims), "shape": list(info.shape),
         "axes": _split(info.sharding), "dtype": info.dtype.name, "itemsize": info.dtype.itemsize}
        for info in parameter_table(nnx.state(model), runner.placement)
    ]  # fmt: skip


def _pages(runner: ModelRunner, request: InspectRequest) -> list[dict[str, Any]]:
    """List the KV cache arrays. times: number of blocks of the segment, which have one array each."""
    state = engine_state(runner, **request.sizes)
    arrays = []
    for segment, blocks in enumerate(state.pages):
        head_dims = runner.config.cache_spec(runner.segments[segment].first).head_dims
        names = ("keys", "values") if len(head_dims) == 2 else ("latents",)
        for number, array in enumerate(blocks[0]):
            kind = names[number % len(names)] + ("" if number < len(names) else " scales")
            dtype = jnp.dtype(array.dtype)
            arrays.append({
                "path": f"pages/{segment}/{kind}", "part": "kv", "times": len(blocks),
                "dims": list(PAGE_DIMS[: array.ndim]), "shape": list(array.shape), "axes": _split(array.sharding),
                "dtype": dtype.name, "itemsize": dtype.itemsize,
            })  # fmt: skip
    return arrays


def _split(sharding: Any) -> list[list[str]]:
    """Return the mesh axes that split each dim, outermost first, without axes of size 1."""
    axes = (one if isinstance(one, tuple) else (one,) for one in sharding.spec)
    return [[axis for axis in one if axis is not None and sharding.mesh.shape[axis] > 1] for one in axes]


def _step(runner: ModelRunner, request: InspectRequest, phase: Phase) -> dict[str, Any]:
    """Return the shapes of a step on one batch rank, and every collective with its location."""
    placement = runner.placement
    bucket = step_bucket(runner, phase, **request.sizes)
    tokens = bucket.num_tokens // bucket.micro_batches
    token_shard_axes = [
        axis
        for axis in placement.token_shard_axes(placement.token_dim(tokens * runner.num_ranks))
        if placement.mesh.shape[axis] > 1
    ]
    return {
        "tokens": bucket.num_tokens, "seq_slots": bucket.seq_slots, "micro_batches": bucket.micro_batches,
        "token_shard_axes": token_shard_axes, "strip": tokens // placement.size(token_shard_axes),
        "sites": [
            {"location": site.location, "segment": site.segment, "block": site.block, "op": site.collective.op,
             "axes": list(site.collective.axes), "bytes": site.collective.result_bytes,
             "sent": site.collective.sent_bytes(placement.size(site.collective.axes)), "count": site.count}
            for site in runner.traffic.sites(bucket)
        ],
    }  # fmt: skip

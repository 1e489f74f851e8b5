"""Report how a model is sharded over a mesh, and the collectives of its steps, without loading weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from flax import nnx

from jaxmoe.aot.compile import PHASES, collective_rows, compile_step
from jaxmoe.aot.request import InspectRequest
from jaxmoe.config import ModelConfig
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.model.kernels import KernelConfig, prepare_kernels
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.mesh import build_mesh
from jaxmoe.planner.sizes import behind_windows
from jaxmoe.weights.params import ParamInfo, parameter_table


@dataclass(frozen=True, kw_only=True)
class ByteCounts:
    """Break down the bytes of arrays: device * number of devices = model + padding + head_copies + replicas.

    device: bytes per device. model: the model's parameters, once. padding: zeros that make splits even, zeros of slots
    without a layer, and scales that are repeated because a split cuts their blocks. head_copies: repeated key/value
    heads inside an array. replicas: further copies of whole arrays, with their padding, on devices along mesh axes that
    do not split them.
    """

    device: int
    model: int
    padding: int
    head_copies: int
    replicas: int


@dataclass(frozen=True, kw_only=True)
class ParamReport:
    """Describe one parameter, stacked over equal layers.

    config_shape: shape without padding and copies. axes: mesh axes that split each logical dim.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    config_shape: tuple[int, ...]
    axes: dict[str, tuple[str, ...]]
    bytes: ByteCounts

    def as_json(self) -> dict[str, Any]:
        """Return the row that `jaxmoe inspect --json` prints."""
        return {
            "path": self.path, "dtype": self.dtype, "shape": list(self.shape), "config_shape": list(self.config_shape),
            "sharding": {dim: list(axes) for dim, axes in self.axes.items()}, "bytes": vars(self.bytes),
        }  # fmt: skip


def parameter_reports(runner: ModelRunner) -> list[ParamReport]:
    """Report every parameter, in the order of the runner's leaves."""
    config, placement, kernels = runner.config, runner.placement, runner.kernels
    if placement.num_stages > 1:  # pipeline stages always stack layers
        kernels = replace(kernels, layers="scan")
    alone = replace(placement, mesh=build_mesh({}, placement.mesh.devices.flat[:1].tolist()), virtual_stages=1)
    here, plain = (
        parameter_table(nnx.state(abstract_model(config, each, dtype=runner.dtype, kernels=chosen)), each)
        for each, chosen in ((placement, runner.kernels), (alone, kernels))
    )
    assert [info.path for info in here] == [info.path for info in plain]
    return [_report(config, info, real.shape, _kv_copies(runner, info)) for info, real in zip(here, plain, strict=True)]


def _kv_copies(runner: ModelRunner, info: ParamInfo) -> int:
    """Return how many copies of each key/value head a parameter holds. Repeated scales count as padding instead."""
    if "kv_head" not in info.dims or info.path.endswith("/scales"):
        return 1
    _, segment, *_ = info.path.split("/")  # as LayerPlace.path
    return runner.sizes[int(segment)].kv_copies


def _report(config: ModelConfig, info: ParamInfo, config_shape: tuple[int, ...], kv_copies: int) -> ParamReport:
    mesh, itemsize = info.sharding.mesh, info.dtype.itemsize
    model = math.prod(config_shape) * itemsize
    # Columns per head slot: its queries alone, or its queries, one key and one value, or a single column.
    columns = config_shape[info.dims.index("head_slot")] if "head_slot" in info.dims else 1
    keys_and_values = columns - config.num_query_groups if "head_slot" in info.dims else 1
    head_copies = model // columns * keys_and_values * (kv_copies - 1)
    device = math.prod(info.sharding.shard_shape(info.shape)) * itemsize
    split = (axes if isinstance(axes, tuple) else (axes,) for axes in info.sharding.spec)
    return ParamReport(
        path=info.path, dtype=info.dtype.name, shape=info.shape, config_shape=config_shape,
        axes={
            dim: tuple(axis for axis in axes if axis is not None and mesh.shape[axis] > 1)
            for dim, axes in zip(info.dims, split, strict=True)
        },
        bytes=ByteCounts(
            device=device, model=model, padding=info.num_bytes - model - head_copies, head_copies=head_copies,
            replicas=device * mesh.size - info.num_bytes,
        ),
    )  # fmt: skip


def total_bytes(reports: list[ParamReport]) -> ByteCounts:
    """Sum the bytes of all parameters."""
    return ByteCounts(
        **{one.name: sum(getattr(report.bytes, one.name) for report in reports) for one in fields(ByteCounts)}
    )


def report(request: InspectRequest, on_phase: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """Report sharding and collectives of a model on this machine's devices, as `jaxmoe inspect --json` prints them.

    On a CPU, bfloat16 steps are compiled in float32, because XLA:CPU sends bfloat16 as float32. on_phase is called with
    the name of each step before it is compiled. Raises: as InspectRequest.checked_model; MeshError if the mesh needs
    more devices than are available.
    """
    config, axes = request.checked_model()
    sizes = request.sizes
    mesh, dtype = build_mesh(axes), config.dtype
    runner = request.runner(config, mesh, _kernels(request, config, dtype, axes))
    parameters = parameter_reports(runner)
    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        steps = request.runner(config, mesh, _kernels(request, config, "float32", axes), dtype="float32")
    else:
        steps = runner
    collectives: list[dict[str, Any]] = []
    for phase in PHASES:
        on_phase(phase)
        step = compile_step(steps, phase, **sizes, decode_steps=request.engine.decode_steps)
        collectives += collective_rows(phase, step)
    return {
        "family": config.family, "devices": mesh.size, "platform": jax.default_backend(), "mesh": axes,
        "layout": str(runner.placement.layout), "virtual_stages": runner.placement.virtual_stages, "dtype": dtype,
        "dispatch": runner.kernels.dispatch, "parameters": [one.as_json() for one in parameters],
        "bytes": vars(total_bytes(parameters)),
        "behind_windows": behind_windows(
            config, sizes["context"], chunk_tokens=sizes["chunk_tokens"],
            num_bytes=runner.bytes_per_token / config.num_hidden_layers,
        ),
        "steps": {
            "dtype": steps.dtype, "kv_dtype": steps.kv_dtype, "max_num_seqs": sizes["max_num_seqs"],
            "context": sizes["context"], "chunk_tokens": sizes["chunk_tokens"],
        },
        "collectives": collectives, "as_planned": all(one["count"] == one["planned"] for one in collectives),
    }  # fmt: skip


def _kernels(request: InspectRequest, config: ModelConfig, dtype: str, axes: Mapping[str, int]) -> KernelConfig:
    return prepare_kernels(dtype, request.kernels, request.chosen_kernels(config, dtype, axes))

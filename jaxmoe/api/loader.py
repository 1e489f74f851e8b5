"""Load a checkpoint onto a device mesh: check every input, then read weights while the kernels compile."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.engine.runner import ModelRunner
from jaxmoe.errors import ConfigError
from jaxmoe.families import read_config
from jaxmoe.families.dtypes import choose_dtypes, kv_array_dtype
from jaxmoe.model.kernels import choose_kernels, prepare_kernels
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.eplb import balance
from jaxmoe.parallel.layouts import parse_layout
from jaxmoe.parallel.mesh import build_mesh, check_processes, conform_mesh, default_axes, hosts_of, parse_mesh
from jaxmoe.parallel.processes import joined
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.parallel.stages import check_virtual_stages
from jaxmoe.planner.host_spans import tensor_span_line
from jaxmoe.text.eos import eos_ids
from jaxmoe.text.tokenizer import CheckpointTokenizer
from jaxmoe.weights.checkpoint import open_tensors, read_json
from jaxmoe.weights.load import assign_weight_slices, load_params
from jaxmoe.weights.params import parameter_table, state_of
from jaxmoe.weights.safetensors_file import TensorInfo
from jaxmoe.weights.source import find_model
from jaxmoe.weights.stored import as_stored
from jaxmoe.weights.verify import check_whole

Progress = Callable[[int, int], None]
_log = logging.getLogger("jaxmoe")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Hold the weights of a model on its devices, with its tokenizer (None where there is none) and its end tokens."""

    runner: ModelRunner
    tokenizer: CheckpointTokenizer | None
    eos: frozenset[int]


def load_model(model: str | Path, config: EngineConfig, *, on_progress: Progress) -> LoadedModel:
    """Load a checkpoint as a configuration says. Raises: as LLM; all input is checked before weights are read."""
    directory = find_model(model, revision=config.revision)
    raw = read_json(directory / "config.json")
    model_config = read_config(raw, ignore=config.ignore_config_keys)
    dtypes = dict(dtype=config.dtype, weights_dtype=config.weights_dtype, kv_dtype=config.cache.kv_dtype)
    choose_dtypes(model_config, **dtypes)  # fail before opening files
    placement = _placement(config, model_config)
    tokenizer = CheckpointTokenizer.load(directory, read_json(directory / "tokenizer_config.json", required=False))
    eos = eos_ids(directory, tokenizer, vocab_size=model_config.vocab_size)
    tensors = open_tensors(directory)
    model_config, dtype = choose_dtypes(as_stored(model_config, tensors, raw), **dtypes)
    overrides = {} if config.kernels is None else config.kernels
    kernels = choose_kernels(
        dtype, overrides, shared_pages=placement.num_shards("page_token") > 1, quantization=model_config.quantization
    )
    if placement.spans_processes:
        _agree(config, raw, tensors)
        _warn_of_spans(config, replace(model_config, dtype=dtype), placement, dispatch=kernels.dispatch)
    if config.verify:
        check_whole(directory)
    shapes = abstract_model(model_config, placement, dtype=dtype, kernels=kernels)
    abstract = nnx.state(shapes)
    table = parameter_table(abstract, placement)
    sizes = segment_sizes(model_config, placement, shapes.layer_segments)
    slices = assign_weight_slices(directory, tensors, model_config, sizes, shapes.layer_segments)
    with ThreadPoolExecutor(1) as background:  # only after all checks, as compiling writes to the cache
        ready = background.submit(prepare_kernels, dtype, overrides, kernels)
        arrays = load_params(tensors, table, slices, model_config, on_progress=on_progress)
    if ready.result() != kernels:  # native kernels do not compile here; other kernels need other arrays
        del arrays
        again = config.with_options({"kernels": ready.result(), "mesh": placement.mesh, "verify": False})
        return load_model(directory, replace(again, revision=None), on_progress=on_progress)
    whole = nnx.merge(nnx.graphdef(shapes), state_of(abstract, arrays))
    runner = ModelRunner(whole, dtype=dtype, kv_dtype=kv_array_dtype(config.cache.kv_dtype))
    if config.parallel.redundant_experts is not None:
        _spread_experts(runner)
    return LoadedModel(runner=runner, tokenizer=tokenizer, eos=eos)


def _agree(config: EngineConfig, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Compare what processes load with each other. A difference ends all of them, with one line that names it."""
    group = joined()
    if group is None:
        return
    headers = {key: [str(one.dtype), list(one.shape), one.start] for key, one in sorted(tensors.items())}
    group.agree(
        **{name: str(value) for name, value in config.options().items() if name not in ("mesh", "verify")},
        **{
            "mesh": describe_mesh(config.parallel.mesh),
            "config.json": fingerprint(raw), "checkpoint_tensors": fingerprint(headers),
        },
    )  # fmt: skip


def _warn_of_spans(
    config: EngineConfig, model_config: ModelConfig, placement: MeshPlacement, *, dispatch: str
) -> None:  # fmt: skip
    """Log a warning in process 0 if tensor groups span several hosts."""
    if jax.process_index() != 0:
        return
    mesh = placement.mesh
    line = tensor_span_line(
        model_config, placement, hosts_of(mesh), device_kind=mesh.devices.flat[0].device_kind, dispatch=dispatch,
        max_num_seqs=config.max_num_seqs,
    )  # fmt: skip
    if line is not None:
        _log.warning("jaxmoe: %s", line)


def fingerprint(value: Any) -> str:
    """Return 12 hexadecimal digits that differ between different JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def describe_mesh(mesh: str | Mapping[str, int] | Mesh | None) -> str:
    """Return a mesh as text, for comparison between processes."""
    return str(dict(mesh.shape)) if isinstance(mesh, Mesh) else str(mesh)


def _placement(config: EngineConfig, model_config: ModelConfig) -> MeshPlacement:
    parallel = config.parallel
    placement = MeshPlacement(
        mesh=_as_mesh(parallel.mesh, model_config), layout=parse_layout(parallel.layout),
        virtual_stages=parallel.virtual_stages,
        redundant_experts=_check_redundant(parallel.redundant_experts, model_config),
    )  # fmt: skip
    check_virtual_stages(parallel.virtual_stages, stages=placement.num_stages)
    return placement


def _spread_experts(runner: ModelRunner) -> None:
    """Place all experts, redundant ones included, as for equal loads."""
    own = runner.experts
    even = np.ones((own.num_layers, own.num_experts))
    runner.place_experts(balance(even, num_replicas=own.num_physical_experts, num_ranks=own.num_ranks))


def _check_redundant(redundant_experts: int | None, config: ModelConfig) -> int | None:
    if redundant_experts is None:
        return None
    if config.moe is None:
        raise ConfigError(f"redundant_experts={redundant_experts!r}: the model has no experts; remove the option")
    most = 15 * config.moe.num_experts
    if type(redundant_experts) is not int or not 0 <= redundant_experts <= most:
        raise ConfigError(f"redundant_experts={redundant_experts!r} must be a whole number in [0, {most}]")
    return redundant_experts


def _as_mesh(mesh: str | Mapping[str, int] | Mesh | None, config: ModelConfig) -> Mesh:
    if isinstance(mesh, Mesh):
        return check_processes(conform_mesh(mesh))
    if mesh is None:
        axes = default_axes(jax.device_count(), num_experts=config.moe.num_experts if config.moe else 0)
    else:
        axes = parse_mesh(mesh)
    return build_mesh(axes)

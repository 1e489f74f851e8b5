"""Strict reader of config.json's quantization_config: which matrices of a checkpoint are quantized, and how.

Sources: Hugging Face's FineGrainedFP8Config and Mxfp4Config, compressed-tensors' QuantizationScheme, and the
hf_quant_config.json of checkpoints that NVIDIA publishes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any

from jaxmoe.config import ArraySizes, ModelConfig, canonical_dtype
from jaxmoe.errors import ConfigError
from jaxmoe.families.keys import CheckpointKeys, weight_slices
from jaxmoe.families.parameters import checkpoint_parameters
from jaxmoe.families.quantization_tool import quantizer_name
from jaxmoe.families.reader import ConfigReader, shown
from jaxmoe.parallel.stages import layer_segments
from jaxmoe.quantization.formats import (
    FORMATS,
    MXFP4,
    NVFP4,
    BlockAlignment,
    CheckpointQuantization,
    QuantizationFormat,
    WeightQuantization,
)
from jaxmoe.quantization.layout import block_alignment, combined_alignment, is_matrix, oriented
from jaxmoe.weight_slice import WeightSlice

FLOATS = ("float32", "bfloat16", "float16")
# Ignored keys of compressed-tensors: its writer and progress; the calibration, and dtypes that the tensors state too.
_OF_WRITERS = ("global_compression_ratio", "quantization_status", "version")
_OF_SCALES = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_NUMBERS = {("int-quantized", "int"): "int8", ("float-quantized", "float"): "float8_e4m3fn"}


def read_quantization_config(value: Any, *, planned: bool = False) -> CheckpointQuantization | None:
    """Return the quantization that a quantization_config describes, or None if there is none.

    planned: whether to accept also a format that can be sized and planned but not run.
    Raises: ConfigError for an unknown quant_method or an unsupported setting of a known one.
    """
    if value is None or value == {}:
        return None
    method = value.get("quant_method") if isinstance(value, Mapping) else value
    readers = {"fp8": _read_fp8, "mxfp4": _read_mxfp4, "compressed-tensors": _read_compressed}
    if isinstance(value, Mapping) and method == "modelopt":
        quant_config = _read_modelopt(ConfigReader(value, ignore=["quant_method"]))
        if planned:
            return quant_config
        raise ConfigError(
            f"config key 'quantization_config' has quant_method 'modelopt', which can be sized and planned (jaxmoe "
            f"info, jaxmoe plan) but not run; use a checkpoint of {', '.join(readers)}, or an unquantized one"
        )
    if not isinstance(value, Mapping) or not isinstance(method, str) or method not in readers:
        named = isinstance(value, Mapping) and method is None
        which = (
            f"no quant_method, it is the format of {quantizer_name(value)}"
            if named
            else f"quant_method {shown(method)}"
        )
        raise ConfigError(
            f"config key 'quantization_config' has {which}; supported are {', '.join(readers)}, and unquantized "
            f"weights: use such a checkpoint"
        )
    return readers[method](ConfigReader(value, ignore=["quant_method"]))


def _read_fp8(reader: ConfigReader) -> CheckpointQuantization:
    _expect(reader, "fmt", "e4m3", None)
    _expect(reader, "activation_scheme", "dynamic", None)
    _expect(reader, "scale_fmt", "ue8m0", "float", None)
    ignored = _names(reader, "modules_to_not_convert")
    block = reader.get("weight_block_size", None)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 <= n <= 1 << 20 for n in block):
        raise ConfigError(
            f"config key 'quantization_config' has weight_block_size {shown(block)}; two whole numbers are supported, "
            f"as in [128, 128]"
        )
    _finish(reader, "fp8")
    numbers = QuantizationFormat(dtype="float8_e4m3fn", inputs=block[1], outputs=block[0])
    return CheckpointQuantization(method="fp8", format=numbers, ignored=ignored)


def _read_mxfp4(reader: ConfigReader) -> CheckpointQuantization:
    ignored = _names(reader, "modules_to_not_convert")
    _expect(reader, "dequantize", False, None)
    _finish(reader, "mxfp4")
    return CheckpointQuantization(method="mxfp4", format=MXFP4, ignored=ignored)


def _read_modelopt(reader: ConfigReader) -> CheckpointQuantization:
    """Read NVFP4: 4-bit numbers, with one 8-bit scale for every 16 of them along the inputs."""
    _expect(reader, "quant_algo", "NVFP4")
    _expect(reader, "group_size", 16, None)
    for key in ("producer", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups"):
        reader.get(key, None)  # the producer; the KV cache's dtype (--kv-dtype); a repetition
    ignored = (*_names(reader, "exclude_modules"), *_names(reader, "ignore"))
    _finish(reader, "modelopt")
    return CheckpointQuantization(method="modelopt", format=NVFP4, ignored=ignored)


def _read_compressed(reader: ConfigReader) -> CheckpointQuantization:
    """Read one group for all Linear modules: symmetric int8 or fp8, with one scale for each output channel."""
    groups = reader.get("config_groups", None)
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError("config key 'quantization_config' must have one group in config_groups")
    inner = next(iter(groups.values()))
    if not isinstance(inner, Mapping) or not isinstance(inner.get("weights"), Mapping):
        raise ConfigError("config key 'quantization_config' has a group without weights")
    group, weights = ConfigReader(inner), ConfigReader(inner["weights"])
    forms = [form for one in (reader, group) if (form := one.get("format", None)) is not None]
    kind = weights.get("type", None)
    actual = {
        "targets": group.get("targets", None), "num_bits": weights.get("num_bits", None),
        "strategy": weights.get("strategy", None), "symmetric": weights.get("symmetric", True),
        "dynamic": weights.get("dynamic", False),
    }  # fmt: skip
    wanted = {"targets": ["Linear"], "num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
    wrong = [f"{key} {shown(actual[key])}" for key, value in wanted.items() if actual[key] != value]
    dtypes = {_NUMBERS.get((str(form), str(kind))) for form in forms or [None]}
    if len(dtypes) > 1 or None in dtypes:
        wrong.insert(0, f"format {' and '.join(map(shown, forms)) or None} of type {shown(kind)}")
    if group.get("output_activations", None):
        wrong.append("output_activations")
    if wrong:
        raise ConfigError(
            f"config key 'quantization_config' of compressed-tensors has {', '.join(wrong)}; supported are "
            f"int-quantized and float-quantized weights of 8 bits, symmetric, with one scale for each output channel "
            f"of all Linear modules"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        setting = reader.get(key, None)
        dense = key == "sparsity_config" and isinstance(setting, Mapping) and setting.get("format") == "dense"
        if setting and not dense:
            raise ConfigError(f"config key 'quantization_config' has {key}, which is not supported: {shown(setting)}")
    numbers = QuantizationFormat(dtype=dtypes.pop(), inputs=None, outputs=1)  # type: ignore[arg-type]
    ignored = _names(reader, "ignore")
    for part, passed in ((reader, _OF_WRITERS), (group, ("weights", "input_activations")), (weights, _OF_SCALES)):
        for key in passed:
            part.get(key, None)
        _finish(part, "compressed-tensors")
    return CheckpointQuantization(method="compressed-tensors", format=numbers, ignored=ignored)


def _expect(reader: ConfigReader, key: str, *allowed: Any) -> None:
    value = reader.get(key, None)
    if value not in allowed:
        choices = " or ".join(repr(one) for one in allowed if one is not None)
        raise ConfigError(f"config key 'quantization_config' has {key} {shown(value)}; only {choices} is supported")


def _finish(reader: ConfigReader, method: str) -> None:
    reader.finish(f"with a quantization_config of {method}", "use a checkpoint without them")


def _names(reader: ConfigReader, key: str) -> tuple[str, ...]:
    names = reader.get(key, None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config key 'quantization_config' has {key} {shown(names)}; it must be a list of names")
    return tuple(names)


def is_plain(module: str, quant_config: CheckpointQuantization) -> bool:
    """Return whether a module matches a name that the checkpoint leaves unquantized, by its method's rules."""
    ends, patterns = _plain_names(quant_config)
    return module.endswith(ends) or any(pattern.match(module) for pattern in patterns)


def tells_layers(quant_config: CheckpointQuantization) -> bool:
    """Return whether the names of unquantized modules may distinguish layers of the same kind.

    Names of only letters, underscores, dots and wildcards cannot.
    """
    return not all(re.fullmatch(r"[A-Za-z_.*]+", name) for name in quant_config.ignored)


@lru_cache(maxsize=64)
def _plain_names(quant_config: CheckpointQuantization) -> tuple[tuple[str, ...], tuple[re.Pattern[str], ...]]:
    """Return the name endings of unquantized modules, and the patterns that match their names from the start."""
    ends, patterns = [], []
    for name in quant_config.ignored:
        try:
            if quant_config.method == "compressed-tensors":
                patterns.append(re.compile(name[3:] if name.startswith("re:") else rf"{re.escape(name)}\Z"))
            else:  # matches from the start up to a dot or the end
                pattern = name if quant_config.method == "fp8" else name.replace(".", r"\.").replace("*", ".*")
                ends.append(name)
                patterns.append(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"))
        except re.error as error:
            raise ConfigError(
                f"config key 'quantization_config' ignores {shown(name)}, which is not a valid pattern ({error})"
            ) from error
    return tuple(ends), tuple(patterns)


def is_quantized(weight_slice: WeightSlice, quant_config: CheckpointQuantization) -> bool:
    """Return whether the checkpoint's files store a tensor of a layer quantized."""
    only = quant_config.method != "mxfp4" or "/moe/experts/" in weight_slice.path
    return only and is_matrix(weight_slice) and not is_plain(weight_slice.key.removesuffix(".weight"), quant_config)


def with_checkpoint_quantization(
    config: ModelConfig, quant_config: CheckpointQuantization | None, names: CheckpointKeys
) -> ModelConfig:
    """Return the config of a model that keeps the quantized matrices of its checkpoint as they are."""
    if quant_config is None:
        return config
    plain = (lambda module: is_plain(module, quant_config)) if quant_config.ignored else None
    only = "moe/experts/" if quant_config.method == "mxfp4" else ""
    kept = weight_quantization(
        config, quant_config.format, names, plain=plain, only=only, apart=tells_layers(quant_config)
    )
    return replace(config, checkpoint_quantization=quant_config, quantization=kept)


def with_weights_dtype(config: ModelConfig, weights_dtype: str | None, names: CheckpointKeys) -> ModelConfig:
    """Return the config of a model that stores its matrices in weights_dtype.

    weights_dtype: None to keep the checkpoint's format, "float32", "bfloat16" or "float16" for unquantized weights, or
    a name in FORMATS.
    Raises: ConfigError for another name, or for a name in FORMATS if the checkpoint is already quantized.
    """
    if weights_dtype is None:
        return config
    weights_dtype = canonical_dtype(weights_dtype)
    if weights_dtype in FLOATS:
        return replace(config, quantization=None)
    if weights_dtype not in FORMATS:
        raise ConfigError(f"weights_dtype={weights_dtype!r} must be one of {', '.join((*FLOATS, *FORMATS))}")
    if config.checkpoint_quantization is not None:
        raise ConfigError(
            f"weights_dtype={weights_dtype} needs an unquantized checkpoint, but this one has quant_method "
            f"{config.checkpoint_quantization.method!r}: omit it to keep that format, or give {', '.join(FLOATS)}"
        )
    kept = weight_quantization(config, FORMATS[weights_dtype], names)
    return replace(config, quantization=kept)


def quantized_slices(config: ModelConfig, names: CheckpointKeys) -> list[WeightSlice]:
    """Return the weight slices of the matrices that a model stores quantized."""
    if config.quantization is None:
        return []
    of = config.quantization.of
    plain = replace(config, checkpoint_quantization=None, quantization=None)
    groups = _matrices(plain, names).items()
    return [weight_slice for (layer, path), group in groups if path in of(layer) for weight_slice in group]


def weight_quantization(
    config: ModelConfig,
    format: QuantizationFormat,
    names: CheckpointKeys,
    *,
    plain: Callable[[str], bool] | None = None,
    only: str = "",
    apart: bool = False,
) -> WeightQuantization | None:
    """Return which matrices a model stores in a format, or None if there are no such matrices.

    These are the matrices of layers that may be quantized and have a path in their block that begins with `only`.
    plain: returns whether a module is unquantized; a matrix stays unquantized if any of its tensors belongs to one.
    apart: whether `plain` may distinguish layers of the same kind.
    Raises: ConfigError if blocks do not divide the inputs of a matrix with packed numbers.
    """
    config = replace(config, checkpoint_quantization=None, quantization=None)
    kinds = [config.kind(layer) for layer in range(config.num_hidden_layers)]
    # If `plain` does not distinguish layers, one layer represents all of its kind.
    chosen = None if apart else {kinds.index(kind) for kind in kinds}
    layers: dict[int, list[tuple[str, BlockAlignment]]] = defaultdict(list)
    alignments: dict[tuple[object, str], BlockAlignment] = {}  # from one layer of each kind
    for (layer, path), group in sorted(_matrices(config, names, chosen).items(), key=lambda item: item[0]):
        if not path.startswith(only):
            continue
        if plain and any(
            plain(module) for module in {weight_slice.key.removesuffix(".weight") for weight_slice in group}
        ):
            continue
        inputs = oriented(group[0]).key_shape[-1]
        if format.packing_factor > 1 and inputs % (format.inputs or 1):
            raise ConfigError(
                f"{path} has {inputs} inputs, not a multiple of the {format.name} block size {format.inputs}"
            )
        like = kinds[layer], path
        if like not in alignments:
            alignments[like] = reduce(
                combined_alignment, (block_alignment(weight_slice, format) for weight_slice in group)
            )
        layers[layer].append((path, alignments[like]))
    if not layers:
        return None
    kept = (layers[layer if chosen is None else kinds.index(kind)] for layer, kind in enumerate(kinds))
    return _one(WeightQuantization(format=format, layers=tuple(map(tuple, kept))))


@lru_cache(maxsize=256)
def _one(kept: WeightQuantization) -> WeightQuantization:
    """Return the first of all equal objects.

    Configs are dict keys, and a comparison of identical objects is immediate.
    """
    return kept


def _matrices(
    config: ModelConfig, names: CheckpointKeys, layers: Collection[int] | None = None
) -> dict[tuple[int, str], list[WeightSlice]]:
    """Return the weight slices of the matrices that may be quantized, by layer and path within its block.

    layers: if given, only these layers.
    """
    segments = layer_segments(config, "unroll")  # one segment per layer
    quantizable = {
        (layer, declaration.path)
        for layer in range(config.num_hidden_layers)
        if layers is None or layer in layers
        for declaration in checkpoint_parameters(config, layer)
        if declaration.quantizable
    }
    matrices: dict[tuple[int, str], list[WeightSlice]] = defaultdict(list)
    for weight_slice in weight_slices(
        config, [ArraySizes.unpadded(config)] * len(segments), names, segments, layers=layers
    ):
        if weight_slice.path.startswith("segments/"):
            _, number, _, path = weight_slice.path.split("/", 3)
            if (int(number), path) in quantizable:
                matrices[int(number), path].append(weight_slice)
    return matrices

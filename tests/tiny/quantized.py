"""Quantized checkpoints in their published on-disk forms, and the values they mean, from the formats' definitions.

Written apart from jaxmoe.quantization.tensors: numbers are drawn, values follow. Dims: [out, in].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .cases import Case
from .checkpoint import _values, tensor_shapes

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
Tensors = dict[str, np.ndarray]


class Written(NamedTuple):
    """Tensors that stand for one matrix, and its float32 value."""

    tensors: Tensors
    value: np.ndarray


def fp8(key: str, w: np.ndarray, *, block: int = 128) -> Written:
    """DeepSeek: every block by a number of its own, so that a scale that is taken from another shows."""
    rows, columns = (-(-n // block) for n in w.shape)
    scales = np.empty((rows, columns), np.float32)
    value = np.empty_like(w)
    numbers = np.empty(w.shape, ml_dtypes.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(w[at]).max() / np.float32(448)
            numbers[at] = (w[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
            value[at] = numbers[at].astype(np.float32) * scales[i, j]
    return Written({key: numbers, f"{key}_scale_inv": scales}, value)


def per_channel(dtype: str) -> Callable[[str, np.ndarray], Written]:
    """compressed-tensors: a scale for each output channel, in bfloat16."""

    def write(key: str, w: np.ndarray) -> Written:
        most = 127 if dtype == "int8" else 448
        scales = (np.abs(w).max(axis=1, keepdims=True) / most * 1.01).astype(ml_dtypes.bfloat16)
        shrunk = w / scales.astype(np.float32)
        numbers = (np.rint(shrunk) if dtype == "int8" else shrunk).astype(dtype)
        value = numbers.astype(np.float32) * scales.astype(np.float32)
        return Written({key: numbers, f"{key}_scale": scales}, value)

    return write


def mxfp4(key: str, w: np.ndarray) -> Written:
    """Blocks of 32 inputs: 16 bytes, low half first, and an exponent. Fused experts turn round: [expert, out, in]."""
    plain, w = w, w.swapaxes(-1, -2) if w.ndim == 3 else w
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    groups = w.reshape(*w.shape[:-1], -1, 32)
    exponents = np.frexp(np.abs(groups).max(axis=-1))[1] - 2
    shrunk = np.clip(groups / 2.0 ** exponents[..., None], -6, 6)
    near = np.abs(shrunk[..., None] - np.array(E2M1)).argmin(axis=-1)
    near = np.where((near == 0) & (rng.random(near.shape) < 0.5), 8, near)  # some zeros are negative
    value = np.array(E2M1)[near] * 2.0 ** exponents[..., None]
    packed = (near[..., 0::2] | near[..., 1::2] << 4).astype(np.uint8)
    stem = key.removesuffix(".weight")
    tensors = {f"{stem}_blocks": packed, f"{stem}_scales": (exponents + 127).astype(np.uint8)}
    value = value.reshape(w.shape).astype(np.float32)
    return Written(tensors, np.ascontiguousarray(value.swapaxes(-1, -2)) if plain.ndim == 3 else value)


def _compressed(kind: str, form: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp\\.gate$", "re:.*shared_expert_gate$"], "quantization_status": "compressed",
    }  # fmt: skip


# What each published form writes a matrix as, and what its config.json says.
FORMS: dict[str, tuple[Callable[[str, np.ndarray], Written], dict[str, Any]]] = {
    "fp8": (
        fp8,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "mlp.gate"],
        },
    ),
    "int8-channel": (per_channel("int8"), _compressed("int", "int-quantized")),
    "fp8-channel": (per_channel("float8_e4m3fn"), _compressed("float", "float-quantized")),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
}  # fmt: skip
_MATRICES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip
_FUSED = ("experts.gate_up_proj", "experts.down_proj")  # plain: [expert, in, out]


def is_quantized(form: str, key: str) -> bool:
    """Whether a checkpoint of a form quantizes a plain one's tensor."""
    module = key.removesuffix(".weight").rsplit(".", 1)[-1]
    matrix = (key.endswith(".weight") and module in _MATRICES) or key.endswith(_FUSED)
    return matrix and (form != "mxfp4" or ".experts." in key)


def write_quantized(
    case: Case,
    form: str,
    directory: Path,
    *,
    plain: bool = False,
    keys: dict[str, Any] | None = None,
    change: Callable[[Tensors], Any] = lambda tensors: None,
) -> Tensors:
    """A case as a quantized checkpoint, or, plain, as one of the values that it means, in float32; the values.

    keys: for its quantization_config. change: of the tensors, before they are written.
    """
    write, config = FORMS[form]
    tensors: Tensors = {}
    values: Tensors = {}
    for key, shape in tensor_shapes(case).items():
        value = _values(case, key, shape)
        if is_quantized(form, key):
            written = write(key, value.astype(np.float32))
            tensors |= written.tensors
            values[key] = written.value
        else:
            tensors[key] = values[key] = value
    change(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    settings = case.config if plain else case.config | {"quantization_config": config | (keys or {})}
    (directory / "config.json").write_text(json.dumps(settings))
    chosen = values if plain else tensors  # save_file writes memory as it lies
    save_file({key: np.ascontiguousarray(value) for key, value in chosen.items()}, directory / "model.safetensors")
    return values

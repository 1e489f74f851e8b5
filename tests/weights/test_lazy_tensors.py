"""Published formats: values by their definitions bit by bit, read by any rows; kept matrices hold them on any mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxmoe import CheckpointError
from jaxmoe.families import read_config, with_weights_dtype
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.layouts import DEFAULT_LAYOUT, parse_layout
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.quantization.formats import FORMATS, MXFP4, QuantizationFormat
from jaxmoe.quantization.tensors import DequantizedTensor, ScaleView, TensorQuantizer, TransposedTensor, dequantize
from jaxmoe.weights import load
from jaxmoe.weights.checkpoint import open_tensors, read_json
from jaxmoe.weights.params import parameter_table

from ..conftest import mesh_of
from ..tiny.cases import CASES_BY_NAME
from ..tiny.quantized import FORMS, is_quantized, write_quantized

ALL = "data=2,tensor=2,expert=2"


class Rows:
    """A tensor in memory."""

    path, start = Path("memory"), 0

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.num_bytes = array, array.shape, array.dtype, array.nbytes

    def at(self, index: int) -> Rows:
        return Rows(self.array[index])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop].copy()


def loaded(directory, mesh: str, *, weights_dtype=None, layout=DEFAULT_LAYOUT, dtype="float32", layers="scan"):
    """Every parameter by its path, as LLM.load places them."""
    config = with_weights_dtype(read_config(read_json(directory / "config.json")), weights_dtype)
    placement = MeshPlacement(mesh=mesh_of(mesh), layout=layout)
    model = abstract_model(config, placement, dtype=dtype, kernels=KernelConfig(layers=layers))
    table = parameter_table(nnx.state(model), placement)
    tensors = open_tensors(directory)
    parts = load.assign_weight_slices(
        directory, tensors, config, segment_sizes(config, placement, model.layer_segments), model.layer_segments
    )
    arrays = load.load_params(tensors, table, parts, config)
    for info, array in zip(table, arrays, strict=True):
        assert array.sharding == info.sharding
    return {info.path: np.asarray(array) for info, array in zip(table, arrays, strict=True)}, config


def values_of(numbers: np.ndarray, scales: np.ndarray, format: QuantizationFormat, in_dim: int) -> np.ndarray:
    """What a quantized parameter means, by ml_dtypes."""
    if format.dtype == "mxfp4":
        halves = np.stack([numbers & 15, numbers >> 4], axis=in_dim + 1)
        shape = list(numbers.shape)
        shape[in_dim] *= 2
        values = halves.reshape(shape).view("float4_e2m1fn").astype(np.float32)
        scales = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    else:
        values = numbers.view(format.dtype).astype(np.float32)
    for dim, count in enumerate(scales.shape):
        scales = np.repeat(scales, values.shape[dim] // count, axis=dim)
    return values * scales


def assert_same_but_padding(value: np.ndarray, plain: np.ndarray, path: str) -> None:
    same = tuple(slice(0, n) for n in plain.shape)
    np.testing.assert_array_equal(value[same], plain, err_msg=path)
    assert np.count_nonzero(value) == np.count_nonzero(plain)


def assert_kept(found: dict, plain: dict, config) -> int:
    """Quantized parameters mean what the plain ones hold (which padding may make smaller); how many there are."""
    kept = [path.removesuffix("/scales") for path in found if path.endswith("/scales")]
    for path in kept:
        in_dim = {"gate_up": 3 if "experts" in path else 1, "down": 2 if "experts" in path else 1, "out": 3}
        held = found[f"{path}/numbers"], found[f"{path}/scales"]
        value = values_of(*held, config.quantization.format, in_dim.get(path.split("/")[-1], 1))
        assert_same_but_padding(value, plain[path], path)
    for path in set(plain) - set(kept):  # biases of experts are padded as these
        assert_same_but_padding(found[path], plain[path], path)
    return len(kept)


def case_of(name: str, **keys):
    case = CASES_BY_NAME[name]
    return replace(case, config=case.config | keys)


CASES = [
    # a width and heads beyond a block, heads that end inside one, one layer dense
    ("fp8", case_of("qwen3_moe_mlp_only", hidden_size=136, head_dim=50, moe_intermediate_size=150), 6),
    ("fp8", case_of("llama_llama3", head_dim=24, num_attention_heads=12, intermediate_size=260), 4),
    ("int8-channel", case_of("qwen2_moe_shared"), 6),
    ("fp8-channel", case_of("olmoe_clip_qkv"), 4),
    ("mxfp4", case_of("mixtral_six_experts", hidden_size=96, intermediate_size=160), 2),
    ("mxfp4", case_of("gpt_oss_window", hidden_size=96, intermediate_size=96), 2),
    # latents beyond a block, heads that end inside one, dims that are turned and so lie in another order
    ("fp8", case_of("deepseek_v3_groups", hidden_size=136, kv_lora_rank=140, q_lora_rank=150), 6),
]
MESHES = [
    ("data=1", "ep-tp"),
    (ALL, "ep-tp"),
    ("tensor=8", "ep-tp"),
    ("pipeline=2,tensor=2,expert=2", "tp"),
    (ALL, "tp-ep"),
]


@pytest.mark.parametrize(("form", "case", "num_kept"), CASES, ids=[case[0] + " " + case[1].name for case in CASES])
def test_kept_matrices_hold_the_published_values_on_every_mesh(form, case, num_kept, tmp_path):
    if "sharded" in case.name or case.config["num_hidden_layers"] < 4:
        case = replace(case, config=case.config | {"num_hidden_layers": 4})
    write_quantized(case, form, tmp_path / "kept")
    write_quantized(case, form, tmp_path / "plain", plain=True)
    for mesh, layout in MESHES:
        placement = dict(mesh=mesh, layout=parse_layout(layout))
        plain, _ = loaded(tmp_path / "plain", **placement)
        found, config = loaded(tmp_path / "kept", **placement)
        assert assert_kept(found, plain, config) >= num_kept
        again, _ = loaded(tmp_path / "kept", **placement, weights_dtype="float32")
        for path, value in plain.items():
            np.testing.assert_array_equal(again[path], value, err_msg=path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantized_values_are_rounded_once(dtype, tmp_path):
    case = case_of("llama_mha")
    values = write_quantized(case, "fp8", tmp_path)
    found, _ = loaded(tmp_path, "data=1", weights_dtype=dtype, dtype=dtype)
    key = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(found["segments/0/0/mlp/down"][1], values[key].T.astype(dtype))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_plain_matrices_are_quantized_on_load_alike_on_every_mesh(name, tmp_path):
    """Each number is the nearest there is under the scale that its block's largest number gives."""
    case = replace(case_of("qwen3_moe_sparse_step", hidden_size=132, head_dim=52), dtype="float32")
    write_quantized(case, "fp8", tmp_path, plain=True)
    plain, _ = loaded(tmp_path, "data=1")
    format, means = FORMATS[name], []
    for mesh in ("data=1", ALL):
        found, _ = loaded(tmp_path, mesh, weights_dtype=name)
        path = "segments/1/0/attention/out"
        means.append(values_of(found[f"{path}/numbers"], found[f"{path}/scales"], format, 3))
    np.testing.assert_array_equal(means[0], means[1][:, : means[0].shape[1], : means[0].shape[2]])
    w = plain[path][0].reshape(-1, 132).T  # as published: [out, in]
    value = means[0][0].reshape(-1, 132).T
    high, wide = format.outputs, format.inputs or w.shape[1]
    for i in range(0, len(w), high):
        for j in range(0, w.shape[1], wide):
            at = np.s_[i : i + high, j : j + wide]
            scale = np.abs(w[at]).max() / np.float32(127 if "int8" in name else 448)
            shrunk = w[at] / scale
            numbers = np.rint(shrunk) if "int8" in name else shrunk.astype("float8_e4m3fn").astype(np.float32)
            np.testing.assert_array_equal(value[at], numbers * scale)


# --- tensors by rows ---


@pytest.mark.parametrize("form", ["fp8", "int8-channel", "fp8-channel", "mxfp4"])
def test_values_are_bit_exact_whichever_rows_are_read(form):
    write = FORMS[form][0]
    w = np.random.default_rng(0).normal(size=(300, 288)).astype(np.float32)
    written = write("w.weight", w)
    numbers, scales = written.tensors.values()
    format = {"fp8": QuantizationFormat(dtype="float8_e4m3fn", inputs=128, outputs=128), "mxfp4": MXFP4}.get(
        form, QuantizationFormat(dtype=str(numbers.dtype), inputs=None, outputs=1)
    )
    tensor = DequantizedTensor(Rows(numbers.reshape(300, -1)), Rows(scales), format)
    assert tensor.shape == w.shape
    for start, stop in ((0, 300), (127, 129), (128, 256), (5, 6), (250, 300)):
        np.testing.assert_array_equal(tensor.read_rows(start, stop), written.value[start:stop])


def test_every_number_of_mxfp4_under_every_exponent():
    numbers = np.tile(np.arange(256, dtype=np.uint8), (255, 1))[:, :, None].repeat(16, 2).reshape(255, -1)
    scales = np.arange(255, dtype=np.uint8)[:, None].repeat(256, 1)
    with np.errstate(over="ignore"):
        found = dequantize(numbers, scales, MXFP4)
    halves = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(255, -1)
    exponents = np.arange(255)[:, None] - 127
    with np.errstate(over="ignore"):
        wanted = np.ldexp(halves.view("float4_e2m1fn").astype(np.float32), exponents)
    np.testing.assert_array_equal(found, wanted)


def test_fused_tensors_of_all_experts_are_read_by_expert():
    rng = np.random.default_rng(0)
    numbers, scales = rng.integers(0, 256, (3, 10, 32), np.uint8), rng.integers(110, 130, (3, 10, 2), np.uint8)
    value = dequantize(numbers, scales, MXFP4)
    turned = TransposedTensor(DequantizedTensor(Rows(numbers), Rows(scales), MXFP4))
    assert turned.shape == (3, 64, 10)
    np.testing.assert_array_equal(turned.at(1).read_rows(5, 60), value[1].T[5:60])
    view = ScaleView(Rows(scales), (3, 10, 4), outputs=1, inputs=16, high=1, wide=8)
    np.testing.assert_array_equal(view.at(1).read_rows(2, 9), scales[1, 2:9].repeat(2, axis=1))
    plain = rng.normal(size=(3, 10, 64)).astype(np.float32)
    whole, each = (TensorQuantizer(Rows(array), FORMATS["int8-block"], "w") for array in (plain, plain[1]))
    np.testing.assert_array_equal(whole.scales.at(1).read_rows(0, 1), each.scales.read_rows(0, 1))
    np.testing.assert_array_equal(whole.numbers.at(1).read_rows(0, 10), each.numbers.read_rows(0, 10))


# --- files that do not fit their config ---


def changed(tmp_path, form: str, change) -> Path:
    """A quantized llama whose tensors are changed in place."""
    write_quantized(case_of("llama_mha"), form, tmp_path, change=change)
    return tmp_path


KEY = "model.layers.1.mlp.up_proj.weight"


def replaced(key: str, change):
    return lambda tensors: tensors.update({key: np.ascontiguousarray(change(tensors[key]))})


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("fp8", lambda t: t.pop(f"{KEY}_scale_inv"), f"1 missing: {KEY}_scale_inv"),
        ("fp8", lambda t: t.pop(KEY), f"1 missing: {KEY}"),
        (
            "fp8",
            replaced(f"{KEY}_scale_inv", lambda s: s[:, :0]),
            f"misshapen: {KEY}_scale_inv [1, 0] instead of [1, 1]",
        ),
        ("fp8", replaced(KEY, lambda w: w.astype(np.float32)), f"{KEY}' has dtype F32; use F8_E4M3 (quant_method fp8)"),
        ("fp8", replaced(f"{KEY}_scale_inv", lambda s: s.astype(np.int8)), "has dtype I8; use F32, F16, BF16, F8_E8M0"),
        (
            "fp8",
            replaced("model.norm.weight", lambda w: w.astype(np.int8)),
            "'model.norm.weight' has dtype I8; use F32",
        ),
        ("int8-channel", replaced(f"{KEY}_scale", lambda s: s[:4]), "_scale [4, 1] instead of [84, 1]"),
        ("int8-channel", replaced(KEY, lambda w: w.astype(ml_dtypes.float8_e4m3fn)), "dtype F8_E4M3; use I8 (quant_m"),
        ("int8-channel", lambda t: t.update({f"{KEY}_zero_point": t[f"{KEY}_scale"]}), f"1 unused: {KEY}_zero_point"),
    ],
)
def test_tensors_that_do_not_fit_the_format_are_one_line(form, change, words, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        loaded(changed(tmp_path, form, change), "data=1")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_of_channels_may_be_flat(tmp_path):
    flat = lambda t: t.update({key: t[key][:, 0] for key in t if key.endswith("_scale")})  # noqa: E731
    wanted, _ = loaded(changed(tmp_path / "a", "int8-channel", lambda t: None), "data=1")
    found, _ = loaded(changed(tmp_path / "b", "int8-channel", flat), "data=1")
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value)


def test_numbers_without_a_quantization_config_are_no_plain_ones(tmp_path, tiny_dir):
    directory = changed(tmp_path, "fp8", lambda t: [t.pop(key) for key in list(t) if key.endswith("_scale_inv")])
    (directory / "config.json").write_bytes((tiny_dir("llama_mha") / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"dtype F8_E4M3; use F32, F16, BF16: config.json has no quantization_config"
    ):
        loaded(directory, "data=1")


def test_a_matrix_that_the_config_leaves_out_and_the_files_quantize_is_dequantized(tmp_path):
    """As matrices are that the model keeps plain always, and others of the same parameter with them."""
    case = case_of("llama_mha")
    keys = {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp"]}
    values = write_quantized(case, "fp8", tmp_path, keys=keys)
    found, config = loaded(tmp_path, "data=1")
    assert "mlp/down" in config.quantization.of(0)
    assert "mlp/down" not in config.quantization.of(1)
    np.testing.assert_array_equal(found["segments/1/0/mlp/down"][0], values["model.layers.1.mlp.down_proj.weight"].T)
    assert is_quantized("fp8", "model.layers.1.mlp.down_proj.weight")

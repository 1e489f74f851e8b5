"""Other dtypes, and the place where quantization joins."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxmoe import LLM
from jaxmoe.errors import CheckpointError
from jaxmoe.families import is_exact, read_config
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.transformer import abstract_model
from jaxmoe.parallel.sharding import MeshPlacement, segment_sizes
from jaxmoe.weights import convert as convert_module
from jaxmoe.weights import transform
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.convert import convert
from jaxmoe.weights.dtypes import DTYPES, TensorSpec
from jaxmoe.weights.load import assign_weight_slices
from jaxmoe.weights.manifest import read_manifest
from jaxmoe.weights.params import parameter_table
from jaxmoe.weights.verify import problems

from ..conftest import mesh_of
from ..tiny.cases import CASES_BY_NAME, QUICK_CASES
from .hf_checkpoints import TensorBytes, bytes_of, write_checkpoint_dir

CASE = "mixtral_window"

NUMBERS = np.array([0.1, -3.0, 65504.0, 1e-30, np.inf, -0.0, 1 / 3, np.nan], np.float32)


@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_plain_floats_become_another_dtype(dtype, to, tmp_path):
    numbers = NUMBERS.astype(DTYPES[dtype].numpy)
    if dtype == "BF16":
        numbers[2] = 1.0  # 65504 rounds up to what float16 does not reach
    tensors: dict[str, TensorBytes] = {"x": (dtype, (2, 4), numbers.tobytes()), "n": ("I32", (2,), bytes(range(8)))}
    source = write_checkpoint_dir(tmp_path / "source", tensors, torch_dtype="float64", text_config={"dtype": "float64"})
    convert(source, tmp_path / "out", weights_dtype=to)
    found = bytes_of(tmp_path / "out")
    wanted = {
        "float32": np.dtype(np.float32),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype(np.float16),
    }[to]
    assert found["n"] == ("I32", (2,), bytes(range(8)))
    assert found["x"][:2] == (transform.WEIGHTS_DTYPES[to], (2, 4))
    expected = numbers.astype(np.float32).astype(wanted).astype(np.float32)
    np.testing.assert_array_equal(np.frombuffer(found["x"][2], wanted).astype(np.float32), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]) == (to, {"dtype": to})
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["deepseek_v3_groups", "glm4_moe_groups"])
def test_what_models_hold_exactly_stays(name, to, tiny_dir, tmp_path):
    convert(tiny_dir(name), tmp_path / "out", weights_dtype=to)
    before, after = bytes_of(tiny_dir(name)), bytes_of(tmp_path / "out")
    exact = {key for key in before if key.endswith("e_score_correction_bias")}
    assert exact
    for key in before:
        assert after[key] == before[key] if key in exact else after[key][0] == transform.WEIGHTS_DTYPES[to]


@pytest.mark.parametrize("name", [case.name for case in QUICK_CASES])
def test_what_models_hold_exactly_is_what_casts_leave(name, tiny_dir):
    config, placement = read_config(CASES_BY_NAME[name].config), MeshPlacement(mesh=mesh_of("data=1"))
    model = abstract_model(config, placement, dtype="bfloat16", kernels=KernelConfig())
    exact = {info.path for info in parameter_table(nnx.state(model), placement) if info.dtype == np.float32}
    sizes = segment_sizes(config, placement, model.layer_segments)
    parts = assign_weight_slices(tiny_dir(name), open_tensors(tiny_dir(name)), config, sizes, model.layer_segments)
    for path, weight_slices in parts.items():
        assert {is_exact(weight_slice.key) for weight_slice in weight_slices} == {path in exact}


def test_a_cast_model_runs_in_its_dtype(tiny_dir, tmp_path):
    convert(tiny_dir(CASE), tmp_path / "out", weights_dtype="fp16")
    assert read_manifest(tmp_path / "out").options["weights_dtype"] == "float16"
    assert LLM.load(tmp_path / "out", mesh=mesh_of("data=1")).config.dtype == "float16"


@pytest.mark.parametrize(
    ("dtype", "to", "large"),
    [("F32", "float16", 7e4), ("BF16", "float16", 7.014e4), ("F32", "bfloat16", 3.4e38), ("F64", "bfloat16", 3.4e38),
     ("F64", "float32", 1e39)],
)  # fmt: skip
def test_numbers_out_of_reach_are_said(dtype, to, large, tmp_path):
    numbers = np.array([1.0, np.inf, large], DTYPES[dtype].numpy)
    source = write_checkpoint_dir(tmp_path / "source", {"x": (dtype, (3,), numbers.tobytes())})
    with pytest.raises(CheckpointError, match=re.escape(f"tensor 'x' holds {large:.4g}, outside the range of {to}")):
        convert(source, tmp_path / "out", weights_dtype=to)
    assert not (tmp_path / "out").exists()


def test_numbers_are_rounded_once(tmp_path):
    """What float32 rounds to the middle of two neighbors of bfloat16, on either side of it; and numbers at random."""
    ulp = 2.0**-7
    middles = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 2.0**-134, 0.0, -0.0, np.inf, -np.inf, np.nan])
    near = [middles, middles + 2.0**-40, middles - 2.0**-40, middles * (1 + 2.0**-45)]
    rng = np.random.default_rng(0)
    numbers = np.concatenate([*near, rng.standard_normal(500) * 2.0 ** rng.integers(-150, 120, 500)])
    numbers = np.concatenate([numbers, -numbers])
    source = write_checkpoint_dir(tmp_path / "source", {"x": ("F64", numbers.shape, numbers.tobytes())})
    convert(source, tmp_path / "out", weights_dtype="bfloat16")
    found = np.frombuffer(bytes_of(tmp_path / "out")["x"][2], ml_dtypes.bfloat16).astype(np.float64)
    bits = np.arange(1 << 16, dtype=np.uint16)
    every = np.unique(bits[bits & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16).astype(np.float64))
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(found[~finite], numbers[~finite])
    distance = np.abs(every - numbers[finite, None])
    np.testing.assert_array_equal(np.abs(found[finite] - numbers[finite]), distance.min(axis=1))
    tied = (distance == distance.min(axis=1)[:, None]).sum(axis=1) > 1
    assert tied.any()
    assert not (found[finite][tied].astype(ml_dtypes.bfloat16).view(np.uint16) & 1).any()


class _Blocks(transform.IdentityTransform):
    """A stand-in for quantization: rows of 4 become their sums beside a weight of one byte."""

    working_ratio = 1.0

    def outputs(self, tensor):
        rows, columns = tensor.shape
        scale = TensorSpec(name=f"{tensor.name}_scale", dtype="F32", shape=(rows // 4,))
        return TensorSpec(name=tensor.name, dtype="I8", shape=(rows, columns)), scale

    def granule(self, tensor):
        return 4 * tensor.shape[1]

    def apply(self, tensor, numbers):
        return numbers.astype(np.int8), numbers.reshape(-1, self.granule(tensor)).sum(axis=1)


def test_a_transform_may_give_several_tensors(tmp_path, monkeypatch):
    """The place where quantization joins: slices of whole granules, streamed to several outputs."""
    values = np.random.default_rng(0).integers(-9, 9, (40, 6)).astype(np.float32)
    source = write_checkpoint_dir(tmp_path / "source", {"w": ("F32", (40, 6), values.tobytes())})
    monkeypatch.setattr(convert_module, "transform_of", lambda *_, **__: _Blocks())
    monkeypatch.setattr("jaxmoe.weights.stream._SLICE_BYTES", 2 * 4 * 6 * 4 + 5)
    convert(source, tmp_path / "out")
    found = bytes_of(tmp_path / "out")
    assert found["w"] == ("I8", (40, 6), values.astype(np.int8).tobytes())
    assert found["w_scale"] == ("F32", (10,), values.reshape(10, -1).sum(axis=1).tobytes())

"""Peak host memory of a load: little beyond what lands on the devices, measured in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
D, F, V, C = 1024, 2048, 16384, 64  # width, expert width, vocabulary, head dim


def _shapes(num_layers: int, num_experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (D, D) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (4 * C, D) for name in "kv"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (num_experts, D)
        for expert in range(num_experts):
            for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def write_zeros(directory: Path, *, num_layers: int, num_experts: int, num_files: int) -> tuple[int, int]:
    """A Mixtral of zeros as sparse files (reading them fills memory all the same); bytes in all, and of the largest."""
    config = {
        "model_type": "mixtral", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "torch_dtype": "bfloat16",
        "num_hidden_layers": num_layers, "num_attention_heads": D // C, "num_key_value_heads": 4,
        "num_local_experts": num_experts, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    shapes = _shapes(num_layers, num_experts)
    keys, weight_map = list(shapes), {}
    for number in range(num_files):
        name, header, end = f"model-{number}.safetensors", {}, 0
        for key in keys[number * len(keys) // num_files : (number + 1) * len(keys) // num_files]:
            start, end = end, end + 2 * math.prod(shapes[key])
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def _excess(directory: Path, num_devices: int, mesh: str, num_bytes: int) -> int:
    """Peak resident bytes of a load, less those before it and those on the devices after it."""
    flags = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.weights.memory_probe", str(directory), str(num_devices), mesh]
    done = subprocess.run(command, cwd=ROOT, env=flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["on_devices"] >= num_bytes
    assert found["most"] - found["before"] >= 0.9 * num_bytes  # the measure does see what was loaded
    print(f"{mesh}: {json.dumps(found)}")
    return found["most"] - found["before"] - found["on_devices"]


def test_one_device(tmp_path):
    """600 MB whose largest parameter (the stacked experts) exceeds the largest tensor six times over."""
    num_bytes, largest = write_zeros(tmp_path, num_layers=2, num_experts=20, num_files=3)
    assert num_bytes > 550e6
    assert largest < 40e6
    assert _excess(tmp_path, 1, "data=1", num_bytes) <= largest + 300 * MIB


@pytest.mark.sweep
@pytest.mark.parametrize("mesh", ["data=2,tensor=2,expert=2", "tensor=8", "expert=8"])
def test_eight_devices(tmp_path, mesh):
    num_bytes, largest = write_zeros(tmp_path, num_layers=4, num_experts=28, num_files=5)
    assert num_bytes > 1.4e9
    assert _excess(tmp_path, 8, mesh, num_bytes) <= largest + 300 * MIB

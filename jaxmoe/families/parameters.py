"""Declarations of every parameter of a model: path, logical dims, part of the model, and the tensor that fills it.

The model creates its parameters from these declarations, keys.py maps the tensors of checkpoints to them, and the
planner computes their shards. No other module states the path or the shape of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ArraySizes, ModelConfig

Part = Literal["embedding", "attention", "dense_mlp", "router", "experts", "shared_expert", "norms", "head"]
Initializer = Literal["normal", "ones", "zeros"]
# How checkpoints store a parameter: as one whole tensor; as rows whose rotary pairs may be interleaved; as the rows of
# all heads, with or without rotary pairs; as a tensor of each of q, k and v; as each head's rows of keys or of values
# in kv_b_proj; as the matrices of experts.
StoredForm = Literal[
    "whole", "rotary", "heads", "rotary_heads", "projections", "latent_keys", "latent_values", "experts"
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"  # of all experts of a layer


@dataclass(frozen=True, kw_only=True)
class ParameterDeclaration:
    """Declare one parameter of a block, or outside all blocks.

    path: path within its block. dims: sizes of its logical dims, in order. lead: number of leading batch dims of a
    stack of matrices. over: number of input dims after them; 0 if it is not multiplied as a matrix. quantizable:
    whether the model may store it quantized. dtype: None for the model's dtype. key: name of the tensor that fills it,
    empty if checkpoints have none. Its fields are the modules of a layer ({layer}, {attention}, {dense}, {moe}), names
    of CheckpointKeys ({router}, {selection_bias}, {shared}), and q, k or v ({projection}). stored: how the tensor holds
    it. transposed: whether the tensor holds it with its dims in reverse order, as [out, in]; for experts, the family
    decides.
    """

    path: str
    part: Part
    dims: Mapping[str, int]
    lead: int = 0
    over: int = 0
    quantizable: bool = False
    initializer: Initializer = "normal"
    dtype: Literal["float32", "int32"] | None = None
    key: str = ""
    stored: StoredForm = "whole"
    transposed: bool = False


def _matrix(
    path: str,
    part: Part,
    key: str,
    dims: Mapping[str, int],
    *,
    lead: int = 0,
    over: int = 1,
    quantizable: bool = True,
    stored: StoredForm = "whole",
) -> ParameterDeclaration:
    """Return a declaration of matrices that checkpoints store as [out, in]."""
    return ParameterDeclaration(
        path=path, part=part, dims=dims, lead=lead, over=over, quantizable=quantizable, key=key, stored=stored,
        transposed=True,
    )  # fmt: skip


def _norm(path: str, key: str, dims: Mapping[str, int], stored: StoredForm = "whole") -> ParameterDeclaration:
    return ParameterDeclaration(path=path, part="norms", dims=dims, initializer="ones", key=key, stored=stored)


def _bias(
    path: str, part: Part, key: str, dims: Mapping[str, int], stored: StoredForm = "whole"
) -> ParameterDeclaration:
    return ParameterDeclaration(path=path, part=part, dims=dims, initializer="zeros", key=key, stored=stored)


def outer_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterDeclaration]:
    """Yield the parameters outside the layer stack: the embedding first, then final norm and LM head."""
    width, vocab = config.hidden_size, sizes.vocab
    embedding = HEAD if config.checkpoint.head_is_embedding else EMBEDDING
    yield ParameterDeclaration(path="embed", part="embedding", dims={"vocab": vocab, "width": width}, key=embedding)
    yield _norm("final_norm", "model.norm.weight", {"width": width})
    if not config.tie_word_embeddings:
        yield _matrix("head", "head", HEAD, {"width": width, "vocab": vocab}, quantizable=False)


def block_parameters(
    config: ModelConfig, sizes: ArraySizes, layer: int, *, maps_experts: bool = False
) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of one layer. maps_experts: whether it has a map of physical experts."""
    yield from norm_parameters(config)
    yield from attention_parameters(config, sizes)
    if config.moe_layers[layer]:
        yield from moe_parameters(config, sizes, maps_experts=maps_experts)
    else:
        yield from mlp_parameters(config, sizes)


def checkpoint_parameters(config: ModelConfig, layer: int) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of one layer that checkpoints contain, without padding.

    They include those of an attention indexer, which no model here runs.
    """
    yield from block_parameters(config, ArraySizes.unpadded(config), layer)
    yield from _indexer_parameters(config)


def norm_parameters(config: ModelConfig) -> Iterator[ParameterDeclaration]:
    """Yield the norms before the attention block and before the feed-forward block of a layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _norm(name, f"{{layer}}.{name}.weight", {"width": config.hidden_size})


def attention_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of an attention block: grouped-query or latent."""
    return (_grouped_parameters if config.mla is None else _latent_parameters)(config, sizes)


def _grouped_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of grouped-query attention.

    The slots of a key/value head hold its query heads, then its key, then its value.
    """
    width, head_dim, projection = config.hidden_size, config.head_dim, "{attention}.{projection}_proj"
    query = {"kv_head": sizes.kv_slots, "head_slot": sizes.group_slots, "head_dim": head_dim}
    heads = query | {"head_slot": sizes.group_slots + 2}
    matrix = {"width": width, **heads}
    yield _matrix("attention/qkv", "attention", f"{projection}.weight", matrix, stored="projections")
    yield _output_projection(width, query)
    if config.qkv_bias:
        yield _bias("attention/qkv_bias", "attention", f"{projection}.bias", heads, stored="projections")
    if config.out_bias:
        yield _output_bias(width)
    if config.sinks:
        slots = {"kv_head": sizes.kv_slots, "head_slot": sizes.group_slots}
        yield _bias("attention/sinks", "attention", "{attention}.sinks", slots, stored="heads")
    if config.qk_norm in ("head", "full"):
        full, one_head = config.qk_norm == "full", {"head_dim": head_dim}
        stored: StoredForm = "heads" if full else "whole"
        key_heads = {"kv_head": sizes.kv_slots, "head_dim": head_dim}
        yield _norm("attention/q_norm", "{attention}.q_norm.weight", query if full else one_head, stored)
        yield _norm("attention/k_norm", "{attention}.k_norm.weight", key_heads if full else one_head, stored)


def _latent_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of latent attention (MLA)."""
    mla, width = config.mla, config.hidden_size
    assert mla is not None
    rank, inputs, query_key = mla.kv_lora_rank, {"width": width}, "{attention}.q_proj.weight"
    heads = {"kv_head": sizes.kv_slots, "head_slot": sizes.group_slots}
    cached, kv_key = {"width": width, "latent": mla.cached_dim}, "{attention}.kv_a_proj_with_mqa.weight"
    yield _matrix("attention/kv_down", "attention", kv_key, cached, stored="rotary")
    yield _norm("attention/kv_norm", "{attention}.kv_a_layernorm.weight", {"latent": rank})
    if mla.q_lora_rank is not None:
        inputs, query_key = {"latent": mla.q_lora_rank}, "{attention}.q_b_proj.weight"
        yield _matrix("attention/q_down", "attention", "{attention}.q_a_proj.weight", {"width": width, **inputs})
        yield _norm("attention/q_norm", "{attention}.q_a_layernorm.weight", inputs)
    query = {**inputs, **heads, "head_dim": config.head_dim}
    yield _matrix("attention/q", "attention", query_key, query, stored="rotary_heads")
    up_key = "{attention}.kv_b_proj.weight"
    yield ParameterDeclaration(
        path="attention/key_up", part="attention", dims={**heads, "head_dim": mla.qk_nope_head_dim, "latent": rank},
        key=up_key, stored="latent_keys",
    )  # fmt: skip
    yield ParameterDeclaration(
        path="attention/value_up", part="attention", dims={**heads, "latent": rank, "head_dim": mla.v_head_dim},
        key=up_key, stored="latent_values", transposed=True,
    )  # fmt: skip
    yield _output_projection(width, {**heads, "head_dim": mla.v_head_dim})
    if config.out_bias:
        yield _output_bias(width)


def _output_projection(width: int, heads: dict[str, int]) -> ParameterDeclaration:
    key = "{attention}.o_proj.weight"
    return _matrix("attention/out", "attention", key, {**heads, "width": width}, over=3, stored="heads")


def _output_bias(width: int) -> ParameterDeclaration:
    return _bias("attention/out_bias", "attention", "{attention}.o_proj.bias", {"width": width})


def _indexer_parameters(config: ModelConfig) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of an attention indexer, with the names and dims of its tensors."""
    if config.indexer is None:
        return
    assert config.mla is not None
    width, heads, head_dim = config.hidden_size, config.indexer.num_heads, config.indexer.head_dim
    shapes = {
        "wq_b.weight": {"index_dim": heads * head_dim, "latent": config.mla.q_lora_rank or width},
        "wk.weight": {"index_dim": head_dim, "width": width},
        "weights_proj.weight": {"index_head": heads, "width": width},
        "k_norm.weight": {"index_dim": head_dim},
        "k_norm.bias": {"index_dim": head_dim},
    }
    for name, dims in shapes.items():
        yield ParameterDeclaration(
            path=f"attention/indexer/{name}", part="attention", dims=dims, quantizable=len(dims) == 2,
            key=f"{{attention}}.indexer.{name}",
        )  # fmt: skip


def _gated_parameters(path: str, part: Part, module: str, width: int, ffn: int) -> Iterator[ParameterDeclaration]:
    """Yield the gate, up and down projections of one SwiGLU."""
    for name in ("gate", "up"):
        yield _matrix(f"{path}/{name}", part, f"{module}.{name}_proj.weight", {"width": width, "ffn": ffn})
    yield _matrix(f"{path}/down", part, f"{module}.down_proj.weight", {"ffn": ffn, "width": width})


def mlp_parameters(config: ModelConfig, sizes: ArraySizes) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of a dense MLP."""
    width, ffn = config.hidden_size, sizes.ffn
    yield from _gated_parameters("mlp", "dense_mlp", "{dense}", width, ffn)
    if config.mlp_bias:
        for name in ("gate", "up"):
            yield _bias(f"mlp/{name}_bias", "dense_mlp", f"{{dense}}.{name}_proj.bias", {"ffn": ffn})
        yield _bias("mlp/down_bias", "dense_mlp", "{dense}.down_proj.bias", {"width": width})


def moe_parameters(
    config: ModelConfig, sizes: ArraySizes, *, maps_experts: bool = False
) -> Iterator[ParameterDeclaration]:
    """Yield the parameters of an MoE block. maps_experts: see block_parameters.

    Biases of down projections are of all experts on every rank: they need no grouped matmul.
    """
    moe, width = config.moe, config.hidden_size
    assert moe is not None
    router = {"router_expert": moe.num_experts}
    yield _matrix("moe/router", "router", "{moe}.{router}.weight", {"width": width, **router}, quantizable=False)
    if moe.router_bias:
        yield _bias("moe/router_bias", "router", "{moe}.{router}.bias", router)
    if moe.selection_bias:
        yield ParameterDeclaration(
            path="moe/selection_bias", part="router", dims=router, initializer="zeros", dtype="float32",
            key="{moe}.{selection_bias}",
        )  # fmt: skip
    gate_up, ffn = {"moe_expert": sizes.moe_experts, "gate_or_up": 2}, {"moe_ffn": sizes.moe_ffn}
    yield _matrix(
        "moe/experts/gate_up", "experts", f"{{moe}}.{GATE_UP}", {**gate_up, "width": width, **ffn}, lead=2,
        stored="experts",
    )  # fmt: skip
    yield _matrix(
        "moe/experts/down", "experts", f"{{moe}}.{DOWN}", {"moe_expert": sizes.moe_experts, **ffn, "width": width},
        lead=1, stored="experts",
    )  # fmt: skip
    if moe.biases:
        yield _bias(
            "moe/experts/gate_up_bias", "experts", f"{{moe}}.{GATE_UP}_bias", {**gate_up, **ffn}, stored="experts"
        )
        yield _bias("moe/down_bias", "experts", f"{{moe}}.{DOWN}_bias", {**router, "width": width})
    if maps_experts:
        yield ParameterDeclaration(
            path="moe/physical_expert_map",
            part="router",
            dims={"expert_map": 3, "physical_expert": sizes.moe_experts},
            initializer="zeros",
            dtype="int32",
        )
    if moe.shared_intermediate_size:
        yield from _gated_parameters("moe/shared", "shared_expert", "{moe}.{shared}", width, sizes.shared_ffn)
    if moe.shared_gate:
        gate = {"width": width, "unsharded": 1}
        yield _matrix("moe/shared_gate", "shared_expert", "{moe}.{shared}_gate.weight", gate, quantizable=False)

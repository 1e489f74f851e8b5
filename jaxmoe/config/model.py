"""ModelConfig: the architecture of a decoder-only transformer, in the terms of config.json. Holds no mesh, no array."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxmoe.checks import require
from jaxmoe.config.cache_spec import LayerCacheSpec
from jaxmoe.errors import ConfigError
from jaxmoe.quantization.formats import CheckpointQuantization, WeightQuantization

# RMS norm of query and key: "head" is over each head, "full" over all heads, "unit" over each head without weights,
# in layers with RoPE only.
QKNorm = Literal["none", "head", "full", "unit"]
Scoring = Literal["softmax", "sigmoid"]
TopKOf = Literal["scores", "logits"]


_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def canonical_dtype(name: str) -> str:
    """Return the full name of a dtype.

    Aliases are bf16, fp16, half, fp32, float, and any name with the prefix "torch.". Other names are returned
    unchanged.
    """
    short = name.removeprefix("torch.")
    return _DTYPE_ALIASES.get(short, short)


_require = partial(require, ConfigError)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Configure rotary position embedding (RoPE).

    Attributes:
        theta: base of the rotary frequencies.
        scaling: how frequencies are scaled. "none": unchanged. "linear": all are divided by factor. "llama3": by
            wavelength; short wavelengths are unchanged, long ones are divided by factor, with a blend in between.
            "yarn": by the number of rotations within the original context; frequencies of at least beta_fast rotations
            are unchanged, those of at most beta_slow are divided by factor, with a blend in between.
        factor: divisor of scaled frequencies.
        attention_factor: factor of cosine and sine.
        dims: number of leading dims of a head that are rotated; 0 for all.
        interleaved: whether checkpoints store the two numbers of a rotated pair next to each other. Model parameters
            store them half a head apart.

    The other attributes have the names of their keys in Hugging Face's rope_scaling.
    Source: Llama 3.1's published config, YaRN (arXiv 2309.00071), Hugging Face's rope_scaling.
    """

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    dims: int = 0
    interleaved: bool = False

    def __post_init__(self) -> None:
        known = ("none", "linear", "llama3", "yarn")
        _require(self.scaling in known, f"rope scaling {self.scaling!r} must be one of {', '.join(known[1:])}")
        _require(self.theta > 0, f"rope_theta={self.theta} must be above 0")
        _require(self.factor >= 1, f"rope_scaling factor={self.factor} must be at least 1")
        _require(self.dims >= 0 and self.dims % 2 == 0, f"rotary dims={self.dims} must be an even number")
        _require(self.attention_factor > 0, f"attention_factor={self.attention_factor} must be above 0")
        if self.scaling == "llama3":
            _require(
                self.high_freq_factor >= self.low_freq_factor > 0,
                f"rope_scaling high_freq_factor={self.high_freq_factor} must be at least "
                f"low_freq_factor={self.low_freq_factor}, both above 0",
            )
        if self.scaling == "yarn":
            _require(
                self.beta_fast >= self.beta_slow > 0,
                f"rope_scaling beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow}, both above 0",
            )
            _require(self.theta > 1, f"rope_theta={self.theta} must be above 1 for rope_type yarn")
        if self.scaling in ("llama3", "yarn"):
            _require(
                self.original_max_position_embeddings > 0,
                f"rope_scaling original_max_position_embeddings must be given and above 0 for rope_type {self.scaling}",
            )


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Configure multi-head latent attention (MLA).

    Keys and values of all heads are computed from one latent of kv_lora_rank numbers per token and qk_rope_head_dim
    rotated numbers. Only these are cached. Queries are computed from a latent of q_lora_rank numbers, or from the
    hidden state if q_lora_rank is None. Source: DeepSeek-V2 (arXiv 2405.04434).
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number of at least 1")
        _require(self.q_lora_rank is None or self.q_lora_rank >= 1, f"q_lora_rank={self.q_lora_rank} must be positive")
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")

    @property
    def cached_dim(self) -> int:
        """Return how many numbers are cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Configure the indexer of sparse latent attention, which selects top_k tokens for each query (DeepSeek-V3.2).

    It is read to size these models. It cannot be run.
    """

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class SwiGLUClamp:
    """Configure the clamped SwiGLU: (up + 1) * gate * sigmoid(alpha * gate), gate at most limit, up in [-limit, limit].

    Source: GPT-OSS's published modeling code.
    """

    limit: float
    alpha: float = 1.702

    def __post_init__(self) -> None:
        _require(self.limit > 0, f"swiglu_limit={self.limit} must be above 0")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Configure a Mixture-of-Experts block.

    Attributes:
        num_experts: number of routed experts.
        num_experts_per_tok: number of experts chosen for each token (top_k).
        intermediate_size: width of each expert.
        norm_topk_prob: whether the weights of the chosen experts are normalized to sum to 1.
        shared_intermediate_size: width of a shared expert that every token visits; 0 for no shared expert.
        num_groups: number of expert groups (n_group in DeepSeek's configs). If above 1, a token chooses only among the
            experts of its top_groups best groups.
        top_groups: number of groups a token chooses from (topk_group in DeepSeek's configs).
        experts_per_group_score: number of best experts of a group whose scores are summed to the group's score.
        scoring: function that turns router logits into scores.
        top_k_of: whether experts are chosen by their scores or by the logits, which never saturate.
        router_bias: whether a bias is added to the logits.
        selection_bias: whether a bias is added to the scores for the choice of experts only.
        routed_scaling: factor of the routing weights.
        apply_router_weight_on_input: whether the routing weight multiplies an expert's input instead of its output.
        shared_gate: whether a sigmoid gate scales the shared expert (Qwen2-MoE).
        biases: whether the three matrices of an expert have biases.
        clamp: clamped SwiGLU that replaces SwiGLU.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    shared_intermediate_size: int = 0
    num_groups: int = 1
    top_groups: int = 1
    experts_per_group_score: int = 1
    scoring: Scoring = "softmax"
    top_k_of: TopKOf = "scores"
    router_bias: bool = False
    selection_bias: bool = False
    routed_scaling: float = 1.0
    apply_router_weight_on_input: bool = False
    shared_gate: bool = False
    biases: bool = False
    clamp: SwiGLUClamp | None = None

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, f"num_experts={self.num_experts} must be at least 1")
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok={self.num_experts_per_tok} must lie in [1, num_experts={self.num_experts}]",
        )
        _require(self.intermediate_size >= 1, f"moe_intermediate_size={self.intermediate_size} must be at least 1")
        _require(
            self.shared_intermediate_size >= 0,
            f"shared_expert_intermediate_size={self.shared_intermediate_size} must be at least 0",
        )
        _require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            f"num_groups={self.num_groups} must divide num_experts={self.num_experts}",
        )
        _require(
            1 <= self.top_groups <= self.num_groups,
            f"top_groups={self.top_groups} must lie in [1, num_groups={self.num_groups}]",
        )
        _require(
            self.experts_per_group_score >= 1,
            f"experts_per_group_score={self.experts_per_group_score} must be at least 1",
        )
        among = self.num_experts // self.num_groups * self.top_groups
        _require(
            self.num_experts_per_tok <= among,
            f"num_experts_per_tok={self.num_experts_per_tok} must not exceed the {among} experts of "
            f"top_groups={self.top_groups} groups",
        )
        _require(self.routed_scaling > 0, f"routed_scaling_factor={self.routed_scaling} must be above 0")
        _require(
            not self.apply_router_weight_on_input or self.num_experts_per_tok == 1,
            f"num_experts_per_tok={self.num_experts_per_tok} must be 1 with apply_router_weight_on_input",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """Describe which tensors a checkpoint stores where config.json does not.

    Attributes:
        stacked_experts: whether the experts of a layer are stored as one tensor [E, 2F, D] for gate and up and one
            tensor [E, D, F] for down. transformers 5 saves this layout with save_original_format=False.
        head_is_embedding: whether a tied embedding is stored only under the name of the LM head.
    """

    stacked_experts: bool = False
    head_is_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configure a decoder-only transformer. Per-layer attributes are tuples of length num_hidden_layers.

    Attributes:
        moe_layers: True for layers whose MLP is `moe`.
        sliding_windows: number of tokens a token attends to, including itself; None for all.
        clip_qkv: bound to which queries, keys and values are clipped in both directions.
        attention_chunks: chunk size in positions; a token attends only within its chunk. None for no chunks, () if no
            layer has chunks.
        rope_layers: whether a layer applies RoPE; () if all layers do.
        attn_temperature_tuning: (scale, floor). Layers without RoPE multiply queries by 1 + scale * log(1 +
            floor_of((position + 1) / floor)).
        mla: multi-head latent attention, which replaces grouped-query attention. head_dim is then the query head dim,
            and num_key_value_heads is 1.
        sinks: whether every query head has an attention sink: a logit that takes part in the softmax and has no value.
        score_scale: factor of attention scores; head_dim ** -0.5 by default.
        mtp_layers: number of multi-token prediction layers, which checkpoints contain and inference ignores.
        checkpoint_quantization: how the checkpoint's files store quantized matrices, if they do.
        quantization: which parameters of the model are quantized and how, if any are.
        checkpoint: names and shapes of the stored tensors, if they differ from the published ones.

    Raises: ConfigError with the value and its limit.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    moe_layers: tuple[bool, ...]
    sliding_windows: tuple[int | None, ...]
    moe: MoEConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    clip_qkv: float | None = None
    attention_chunks: tuple[int | None, ...] = ()
    rope_layers: tuple[bool, ...] = ()
    attn_temperature_tuning: tuple[float, int] | None = None
    mla: MLAConfig | None = None
    indexer: IndexerConfig | None = None
    sinks: bool = False
    score_scale: float | None = None
    mtp_layers: int = 0
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    checkpoint_quantization: CheckpointQuantization | None = None
    quantization: WeightQuantization | None = None
    checkpoint: CheckpointLayout = CheckpointLayout()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number of at least 1")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        _require(self.rotary_dims % 2 == 0, f"head_dim={self.head_dim} must be even for rotary embedding")
        _require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps} must be above 0")
        for name in ("moe_layers", "sliding_windows", "attention_chunks", "rope_layers"):
            value = getattr(self, name)
            _require(
                len(value) == self.num_hidden_layers or (not value and name in ("attention_chunks", "rope_layers")),
                f"{name} has {len(value)} entries, num_hidden_layers={self.num_hidden_layers}",
            )
        for window in self.sliding_windows:
            _require(window is None or window >= 1, f"sliding_window={window} must be at least 1")
        for chunk in self.attention_chunks:
            _require(chunk is None or chunk >= 1, f"attention_chunk_size={chunk} must be at least 1")
        _require(
            self.mla is None or self.num_key_value_heads == 1,
            f"num_key_value_heads={self.num_key_value_heads} must be 1 with latent attention",
        )
        _require(
            self.rope.dims <= self.head_dim, f"rotary dims={self.rope.dims} must not exceed head_dim={self.head_dim}"
        )
        _require(not any(self.moe_layers) or self.moe is not None, "a layer is MoE but the config has no experts")
        _require(self.clip_qkv is None or self.clip_qkv > 0, f"clip_qkv={self.clip_qkv} must be above 0")

    def __hash__(self) -> int:
        """Return a hash of a few fields. Configs are looked up in dictionaries often, and configs that differ only in
        the other fields are rare."""
        return hash((self.family, self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers))

    @property
    def num_query_groups(self) -> int:
        """Return how many query heads share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def cache_spec(self, layer: int) -> LayerCacheSpec:
        """Return the KV cache spec of a layer."""
        dims = (self.head_dim, self.head_dim) if self.mla is None else (self.mla.cached_dim,)
        return LayerCacheSpec(
            head_dims=dims, window=self.sliding_windows[layer] or 0, attention_chunk=self.chunk(layer) or 0
        )

    @property
    def cache_specs(self) -> tuple[LayerCacheSpec, ...]:
        """Return the KV cache specs of all layers, in order."""
        return tuple(self.cache_spec(layer) for layer in range(self.num_hidden_layers))

    @property
    def attention_output_dim(self) -> int:
        """Return the output size of attention over the KV cache for one query head."""
        return self.head_dim if self.mla is None else self.mla.kv_lora_rank

    @property
    def rotary_dims(self) -> int:
        """Return how many dims of a head are rotated."""
        return self.rope.dims or self.head_dim

    @property
    def scale(self) -> float:
        """Return the factor of attention scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def chunk(self, layer: int) -> int | None:
        """Return the attention chunk size of a layer in positions, if it has chunks."""
        return self.attention_chunks[layer] if self.attention_chunks else None

    @property
    def visible_span(self) -> tuple[int, int]:
        """Return (window, chunk), the bounds of how far back any layer attends.

        A layer sees at most the last `window` tokens or the tokens of its own chunk of `chunk` positions, whichever
        reaches further back. A bound is 0 if no layer has that limit. The result is (0, 0) if some layer sees all
        tokens.
        """
        chunks = self.attention_chunks or (None,) * self.num_hidden_layers
        if not all(window or chunk for window, chunk in zip(self.sliding_windows, chunks, strict=True)):
            return 0, 0
        windows = [window for window in self.sliding_windows if window]
        alone = [chunk for window, chunk in zip(self.sliding_windows, chunks, strict=True) if chunk and not window]
        return max(windows, default=0), max(alone, default=0)

    def cached_tokens(self, num_tokens: int, chunk_tokens: int) -> int:
        """Return the most tokens of a request of num_tokens that are cached at once.

        Prompts are prefilled chunk_tokens at a time. If every layer has a window or chunk, the bound is the widest of
        them plus chunk_tokens. Otherwise all num_tokens are cached.
        """
        furthest = max(self.visible_span)
        return min(num_tokens, furthest + chunk_tokens) if furthest else num_tokens

    def has_rope(self, layer: int) -> bool:
        """Return whether a layer applies RoPE."""
        return not self.rope_layers or self.rope_layers[layer]

    def kind(self, layer: int) -> tuple[object, ...]:
        """Return all facts in which layers differ. Layers with equal results have the same structure."""
        kept = self.quantization.layers[layer] if self.quantization else ()
        return self.moe_layers[layer], self.sliding_windows[layer], self.chunk(layer), self.has_rope(layer), kept


@dataclass(frozen=True, kw_only=True)
class ArraySizes:
    """Describe the array sizes of one model on one mesh: the config's sizes, padded or replicated until shards are
    even.

    A key/value head is replicated kv_copies times in neighboring slots. Its query heads are distributed over the
    replicas, group_slots each. Unused slots hold zeros. sharding.array_sizes computes the sizes; one device needs no
    padding.
    """

    vocab: int
    kv_slots: int
    kv_copies: int
    group_slots: int
    ffn: int
    moe_experts: int
    moe_ffn: int
    shared_ffn: int

    @classmethod
    def unpadded(cls, config: ModelConfig) -> ArraySizes:
        """Return the config's own sizes."""
        moe = config.moe
        return cls(
            vocab=config.vocab_size, kv_slots=config.num_key_value_heads, kv_copies=1,
            group_slots=config.num_query_groups, ffn=config.intermediate_size,
            moe_experts=moe.num_experts if moe else 0, moe_ffn=moe.intermediate_size if moe else 0,
            shared_ffn=moe.shared_intermediate_size if moe else 0,
        )  # fmt: skip

    def query_slot(self, config: ModelConfig, head: int) -> tuple[int, int]:
        """Return (key/value head slot, index within its group) of a query head."""
        kv_head, place = divmod(head, config.num_query_groups)
        copy, place = divmod(place, self.group_slots)
        return kv_head * self.kv_copies + copy, place

    def key_value_slots(self, kv_head: int) -> range:
        """Return the slots that hold the replicas of a key/value head."""
        return range(kv_head * self.kv_copies, (kv_head + 1) * self.kv_copies)

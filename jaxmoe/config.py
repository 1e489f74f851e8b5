"""ModelConfig: what a decoder-only transformer is, in config.json's terms. Holds no mesh, no array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmoe.errors import ConfigError
from jaxmoe.quantization.formats import CheckpointQuantization, WeightQuantization

# Norms of query and key: with weights over each head or over all, or without over each head that is turned.
QKNorm = Literal["none", "head", "full", "unit"]
Scoring = Literal["softmax", "sigmoid"]
TopKOf = Literal["scores", "logits"]


_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def canonical_dtype(name: str) -> str:
    """Return the full name of a dtype given as an alias (bf16, fp16, half, fp32, float, torch.bfloat16); any other
    name is returned as it is."""
    short = name.removeprefix("torch.")
    return _DTYPE_ALIASES.get(short, short)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. scaling is "none", "linear" (divide every frequency by factor), "llama3"
    (by wavelength: keep short ones, divide long ones by factor, blend between) or "yarn" (by turns within the original
    context: keep those of beta_fast and more, divide those of beta_slow and fewer by factor, blend between).

    dims: the first numbers of a head that are turned; 0 for all. interleaved: whether checkpoints have the two numbers
    of a pair side by side; in parameters they lie half a head apart. attention_factor: of cosine and sine.
    Source: Llama 3.1's published config, YaRN (arXiv 2309.00071), Hugging Face's rope_scaling keys of the same names.
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
    """Multi-head latent attention: keys and values of all heads come from one latent of kv_lora_rank numbers a token
    and qk_rope_head_dim turned ones, which alone are cached. Queries come from a latent of q_lora_rank, or directly
    where that is None. Source: DeepSeek-V2 (arXiv 2405.04434)."""

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
        """Numbers that are cached of a token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """What chooses the top_k tokens that a query of sparse latent attention attends to (DeepSeek-V3.2). Read, so that
    such models can be sized; not run."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class SwiGLUClamp:
    """The clamped SwiGLU: (up + 1) * gate * sigmoid(alpha * gate), gate kept below limit, up within it.

    Source: GPT-OSS's published modeling code.
    """

    limit: float
    alpha: float = 1.702

    def __post_init__(self) -> None:
        _require(self.limit > 0, f"swiglu_limit={self.limit} must be above 0")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A Mixture-of-Experts block: num_experts of width intermediate_size, num_experts_per_tok chosen for each token.

    shared_intermediate_size > 0 adds an expert every token visits, scaled by a sigmoid gate where shared_gate
    (Qwen2-MoE). num_groups > 1: a token chooses among the experts of its top_groups best groups, each as good as the
    sum of its experts_per_group_score most likely experts (n_group and topk_group of DeepSeek's configs). scoring: what
    makes scores of the router's logits. top_k_of: whether experts are chosen by their scores, or by the logits before
    scoring, which never saturate. router_bias: added to the logits; selection_bias: added to scores for the choice
    alone. routed_scaling: what weights are multiplied by. apply_router_weight_on_input: whether an expert's input is
    weighted, not its output. biases: of the experts' three matrices. clamp: in place of SwiGLU.
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
            f"num_experts_per_tok={self.num_experts_per_tok} must be 1 where weights multiply an expert's input",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """Which tensors a checkpoint stores, where config.json does not tell.

    stacked_experts: the experts of a layer lie in one tensor for gate and up [E, 2F, D] and one for down [E, D, F], as
    transformers 5 saves them with save_original_format=False. head_is_embedding: a tied embedding is stored under the
    output head's name alone.
    """

    stacked_experts: bool = False
    head_is_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Per-layer facts are tuples of length num_hidden_layers.

    moe_layers: True where the layer's MLP is `moe`. sliding_windows: tokens attended to, itself included; None for all.
    checkpoint_quantization: how the checkpoint's files hold matrices that are quantized; quantization: which of the
    model's are, and how; None where all are plain. attention_chunks: a token attends within its chunk of so many
    positions; None for all; () for no layer with any. rope_layers: whether positions are embedded; () for all. In
    layers without, queries grow with their position where attn_temperature_tuning is given: (scale, floor) as in 1 +
    scale * log(1 + floor_of((position + 1) / floor)). mla: in place of grouped-query attention; head_dim is then that
    of queries, num_key_value_heads 1. sinks: a logit of every query head that takes part in its softmax and adds
    nothing. score_scale: of attention scores, head_dim ** -0.5 where None. mtp_layers: those of multi-token prediction,
    which checkpoints carry and inference leaves out. checkpoint: names and shapes of the stored tensors, where they are
    not the published ones.
    Raises: ConfigError naming the value and its limit.
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
        """Of a few fields: a config is a key of tables far more often than configs differ in the rest alone."""
        return hash((self.family, self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers))

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def cached_dims(self) -> tuple[int, ...]:
        """Numbers of what is cached of a token, layer and head slot: a key and a value, or a latent key alone, whose
        first numbers are the value."""
        return (self.head_dim, self.head_dim) if self.mla is None else (self.mla.cached_dim,)

    @property
    def attention_output_dim(self) -> int:
        """Numbers of what attention over the cache gives for one query head."""
        return self.head_dim if self.mla is None else self.mla.kv_lora_rank

    @property
    def rotary_dims(self) -> int:
        """Numbers of a head that are turned."""
        return self.rope.dims or self.head_dim

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def chunk(self, layer: int) -> int | None:
        """Positions of an attention chunk of a layer; None where it has none."""
        return self.attention_chunks[layer] if self.attention_chunks else None

    @property
    def visible_span(self) -> tuple[int, int]:
        """(window, chunk): no layer sees more than the last `window` tokens, or than those of its own chunk of so many
        positions, whichever reaches further back. 0 where no layer is so limited; (0, 0) where some layer sees all."""
        chunks = self.attention_chunks or (None,) * self.num_hidden_layers
        if not all(window or chunk for window, chunk in zip(self.sliding_windows, chunks, strict=True)):
            return 0, 0
        windows = [window for window in self.sliding_windows if window]
        alone = [chunk for window, chunk in zip(self.sliding_windows, chunks, strict=True) if chunk and not window]
        return max(windows, default=0), max(alone, default=0)

    def cached_tokens(self, num_tokens: int, chunk_tokens: int) -> int:
        """Tokens of a request of num_tokens whose keys and values are cached at once at most, where prompts are read
        chunk_tokens at a time: all, or where every layer has a window those of the widest and a chunk."""
        furthest = max(self.visible_span)
        return min(num_tokens, furthest + chunk_tokens) if furthest else num_tokens

    def has_rope(self, layer: int) -> bool:
        """Whether a layer embeds positions."""
        return not self.rope_layers or self.rope_layers[layer]

    def kind(self, layer: int) -> tuple[object, ...]:
        """All in which layers differ: those for which this is equal are alike."""
        kept = self.quantization.layers[layer] if self.quantization else ()
        return self.moe_layers[layer], self.sliding_windows[layer], self.chunk(layer), self.has_rope(layer), kept


@dataclass(frozen=True, kw_only=True)
class ArraySizes:
    """The sizes the arrays of one model really have on one mesh: the config's own, padded or replicated to divide it.

    A key/value head is held kv_copies times, in neighboring slots; its query heads are dealt out to the copies,
    group_slots each. Slots and places left over hold zeros. sharding.array_sizes computes this; one device needs none.
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
        """The config's own sizes."""
        moe = config.moe
        return cls(
            vocab=config.vocab_size, kv_slots=config.num_key_value_heads, kv_copies=1,
            group_slots=config.num_query_groups, ffn=config.intermediate_size,
            moe_experts=moe.num_experts if moe else 0, moe_ffn=moe.intermediate_size if moe else 0,
            shared_ffn=moe.shared_intermediate_size if moe else 0,
        )  # fmt: skip

    def query_slot(self, config: ModelConfig, head: int) -> tuple[int, int]:
        """(key/value slot, place within its group) of one query head."""
        kv_head, place = divmod(head, config.num_query_groups)
        copy, place = divmod(place, self.group_slots)
        return kv_head * self.kv_copies + copy, place

    def key_value_slots(self, kv_head: int) -> range:
        """The slots that hold one key/value head."""
        return range(kv_head * self.kv_copies, (kv_head + 1) * self.kv_copies)

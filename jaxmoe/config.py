"""ModelConfig: what a decoder-only transformer is, in config.json's terms. Holds no mesh, no array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmoe.errors import ConfigError
from jaxmoe.formats import Published, Quantisation

QKNorm = Literal["none", "head", "full"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. scaling is "none", "linear" (divide every frequency by factor) or "llama3"
    (by wavelength: keep short ones, divide long ones by factor, blend between).

    Source: Llama 3.1's published config and Hugging Face's rope_scaling keys of the same names.
    """

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        _require(
            self.scaling in ("none", "linear", "llama3"), f"rope scaling {self.scaling!r} must be linear or llama3"
        )
        _require(self.theta > 0, f"rope_theta={self.theta} must be above 0")
        _require(self.factor >= 1, f"rope_scaling factor={self.factor} must be at least 1")
        if self.scaling == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor > 0,
                f"rope_scaling high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}, both above 0",
            )
            _require(
                self.original_max_position_embeddings > 0,
                "rope_scaling original_max_position_embeddings must be given and above 0 for rope_type llama3",
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A Mixture-of-Experts block: num_experts of width intermediate_size, num_experts_per_tok chosen for each token.

    shared_intermediate_size > 0 adds an expert every token visits, scaled by a sigmoid gate (Qwen2-MoE).
    num_groups > 1: a token chooses among the experts of its top_groups best groups, each as good as the sum of its
    group_best most likely experts (n_group and topk_group of DeepSeek's configs).
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    shared_intermediate_size: int = 0
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1

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
        _require(self.group_best >= 1, f"group_best={self.group_best} must be at least 1")
        among = self.num_experts // self.num_groups * self.top_groups
        _require(
            self.num_experts_per_tok <= among,
            f"num_experts_per_tok={self.num_experts_per_tok} must not exceed the {among} experts of "
            f"top_groups={self.top_groups} groups",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Per-layer facts are tuples of length num_hidden_layers.

    moe_layers: True where the layer's MLP is `moe`. sliding_windows: tokens attended to, itself included; None for all.
    published: how the checkpoint's files hold matrices that are quantised; quantisation: which of the model's are, and
    how; None where all are plain.
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
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    published: Published | None = None
    quantisation: Quantisation | None = None

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
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary embedding")
        _require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps} must be above 0")
        for name in ("moe_layers", "sliding_windows"):
            value = getattr(self, name)
            _require(
                len(value) == self.num_hidden_layers,
                f"{name} has {len(value)} entries, num_hidden_layers={self.num_hidden_layers}",
            )
        for window in self.sliding_windows:
            _require(window is None or window >= 1, f"sliding_window={window} must be at least 1")
        _require(not any(self.moe_layers) or self.moe is not None, "a layer is MoE but the config has no experts")
        _require(self.clip_qkv is None or self.clip_qkv > 0, f"clip_qkv={self.clip_qkv} must be above 0")

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True, kw_only=True)
class ArraySizes:
    """The sizes the arrays of one model really have on one mesh: the config's own, padded or replicated to divide it.

    A key/value head is held kv_copies times, in neighbouring slots; its query heads are dealt out to the copies,
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

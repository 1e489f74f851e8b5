"""The tiny checkpoints the tests run on: one table, two to four geometries a family.

Each config is written in the form its published checkpoints use (`rope_theta` and `rope_scaling` at the top level,
`torch_dtype`), except `llama_rope_parameters`, which has the form transformers 5 saves. Together the cases hold expert
counts, key/value head counts, vocabularies and intermediate sizes that no power-of-two mesh axis divides.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_GREEDY_TOKENS = 64
PROMPT_LENGTHS = (5, 17, 30)
DTYPES = ("float32", "bfloat16")

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_QWEN: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    # Published Qwen configs give a window that use_sliding_window=false switches off.
    "sliding_window": 8,
    "max_window_layers": 2,
}
_ROUTER: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_QWEN_MOE: dict[str, Any] = {
    **_QWEN,
    **_ROUTER,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 70,
}

# What a published config of the family says beside its geometry.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "pretraining_tp": 1},
    "mistral": {"architectures": ["MistralForCausalLM"], "rope_theta": 10000.0},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **_QWEN},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], **_QWEN, "attention_bias": False, "rope_scaling": None},
    "mixtral": {"architectures": ["MixtralForCausalLM"], **_ROUTER, "rope_theta": 1000000.0},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], **_QWEN_MOE},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        **_QWEN_MOE,
        "attention_bias": False,
        "rope_scaling": None,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        **_ROUTER,
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny checkpoint: `config` is its config.json, `seed` gives its weights and prompts.

    NUM_GREEDY_TOKENS fit after each prompt within max_position_embeddings.
    `quick` marks the one representative of each family that runs on every mesh.

    Raises: ValueError where dtype, prompts and config do not fit each other.
    """

    name: str
    family: str
    config: dict[str, Any]
    seed: int
    dtype: str
    num_shards: int
    prompts: tuple[tuple[int, ...], ...]
    quick: bool

    @property
    def sharded(self) -> bool:
        """True for several model files with model.safetensors.index.json beside them."""
        return self.num_shards > 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"case {self.name}: dtype={self.dtype!r} must be one of {DTYPES}")
        if self.num_shards < 1:
            raise ValueError(f"case {self.name}: num_shards={self.num_shards} must be at least 1")
        limit = self.config["max_position_embeddings"] - NUM_GREEDY_TOKENS
        for prompt in self.prompts:
            if not 2 <= len(prompt) <= limit:
                raise ValueError(f"case {self.name}: prompt of {len(prompt)} tokens must have 2 to {limit}")
            if not 0 <= min(prompt) <= max(prompt) < self.config["vocab_size"]:
                raise ValueError(
                    f"case {self.name}: prompt tokens must lie in [0, vocab_size={self.config['vocab_size']})"
                )


def _prompts(vocab_size: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """One prompt for each of PROMPT_LENGTHS; random_raw is the one numpy stream promised never to change."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, 0])).random_raw(sum(PROMPT_LENGTHS))
    tokens = [int(raw) % vocab_size for raw in bits]
    starts = [sum(PROMPT_LENGTHS[:i]) for i in range(len(PROMPT_LENGTHS))]
    return tuple(tuple(tokens[start : start + length]) for start, length in zip(starts, PROMPT_LENGTHS, strict=True))


def _case(
    family: str,
    name: str,
    seed: int,
    dtype: str,
    *,
    num_shards: int = 1,
    quick: bool = False,
    drop: tuple[str, ...] = (),
    **geometry: Any,
) -> Case:
    """Case `<family>_<name>`: common and family defaults, then `geometry`, less the keys in `drop`."""
    dtype_key = "dtype" if "rope_parameters" in geometry else "torch_dtype"
    config = {**_COMMON, **_FAMILIES[family], "model_type": family, dtype_key: dtype, **geometry}
    return Case(
        name=f"{family}_{name}",
        family=family,
        config={key: config[key] for key in sorted(config) if key not in drop},
        seed=seed,
        dtype=dtype,
        num_shards=num_shards,
        prompts=_prompts(geometry["vocab_size"], seed),
        quick=quick,
    )


# fmt: off
CASES: tuple[Case, ...] = (
    # Llama 1 and 2: no rope_theta and no num_key_value_heads in the file.
    _case("llama", "mha", 1, "float32",
          vocab_size=97, hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=4),
    # Llama 3.2: llama3 scaling with frequencies kept, blended and divided; head_dim apart from hidden_size; tied.
    _case("llama", "llama3", 402, "bfloat16", num_shards=3, quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=6,
          num_key_value_heads=2, head_dim=16, attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
          eos_token_id=[2, 3], rope_theta=500000.0,
          rope_scaling={"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 64, "rope_type": "llama3"}),
    # Linear scaling under its old key "type"; biases on q, k, v and o.
    _case("llama", "linear_bias", 3, "float32",
          vocab_size=101, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
          num_key_value_heads=1, attention_bias=True, rope_theta=10000.0,
          rope_scaling={"type": "linear", "factor": 4.0}),
    # The form transformers 5 saves: rope_parameters and dtype.
    _case("llama", "rope_parameters", 4, "bfloat16",
          vocab_size=113, hidden_size=56, intermediate_size=76, num_hidden_layers=2, num_attention_heads=7,
          num_key_value_heads=1, head_dim=8, attention_bias=False, mlp_bias=True,
          rope_parameters={"factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 48, "rope_theta": 10000.0, "rope_type": "llama3"}),

    # The window is smaller than two of the prompts.
    _case("mistral", "window", 305, "bfloat16", num_shards=2, quick=True,
          vocab_size=97, hidden_size=48, intermediate_size=76, num_hidden_layers=3, num_attention_heads=6,
          num_key_value_heads=3, sliding_window=9),
    # The window is first left while decoding; head_dim null.
    _case("mistral", "late_window", 6, "float32",
          vocab_size=131, hidden_size=30, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3,
          num_key_value_heads=3, head_dim=None, sliding_window=40),
    # Mistral Nemo: no window; head_dim apart from hidden_size.
    _case("mistral", "no_window", 7, "float32",
          vocab_size=101, hidden_size=40, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4,
          num_key_value_heads=1, head_dim=12, rope_theta=1000000.0, sliding_window=None),

    # Qwen2 0.5B: seven query heads a key/value head, tied, the window in the file switched off.
    _case("qwen2", "tied", 308, "bfloat16", quick=True,
          vocab_size=131, hidden_size=56, intermediate_size=92, num_hidden_layers=3, num_attention_heads=14,
          num_key_value_heads=2, tie_word_embeddings=True),
    # max_window_layers: the layers from this index on are windowed.
    _case("qwen2", "max_window_layers", 309, "float32", num_shards=2,
          vocab_size=97, hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3,
          num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    # layer_types says more than max_window_layers, and wins.
    _case("qwen2", "layer_types", 110, "float32",
          vocab_size=101, hidden_size=48, intermediate_size=68, num_hidden_layers=3, num_attention_heads=6,
          num_key_value_heads=3, use_sliding_window=True, sliding_window=7, max_window_layers=3,
          layer_types=["sliding_attention", "full_attention", "sliding_attention"]),

    _case("qwen3", "tied", 111, "bfloat16", quick=True,
          vocab_size=97, hidden_size=40, intermediate_size=76, num_hidden_layers=3, num_attention_heads=4,
          num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    _case("qwen3", "bias", 12, "float32", num_shards=2, drop=("bos_token_id", "eos_token_id"),
          vocab_size=131, hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=6,
          num_key_value_heads=2, head_dim=12, attention_bias=True),

    _case("mixtral", "six_experts", 413, "bfloat16", num_shards=3, quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=44, num_hidden_layers=2, num_attention_heads=6,
          num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, sliding_window=None),
    _case("mixtral", "window", 314, "float32",
          vocab_size=97, hidden_size=36, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3,
          num_key_value_heads=3, num_local_experts=5, num_experts_per_tok=3, sliding_window=11,
          tie_word_embeddings=True),

    _case("qwen2_moe", "shared", 215, "bfloat16", quick=True,
          vocab_size=131, hidden_size=48, moe_intermediate_size=28, shared_expert_intermediate_size=60,
          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=6, num_experts_per_tok=2,
          norm_topk_prob=False),
    # Layers 0 and 2 are dense.
    _case("qwen2_moe", "sparse_step", 1016, "float32", num_shards=2,
          vocab_size=97, hidden_size=48, moe_intermediate_size=20, shared_expert_intermediate_size=36,
          num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, num_experts=5, num_experts_per_tok=2,
          norm_topk_prob=True, decoder_sparse_step=2),
    # Layer 0 is dense.
    _case("qwen2_moe", "mlp_only", 217, "float32",
          vocab_size=101, hidden_size=36, moe_intermediate_size=20, shared_expert_intermediate_size=44,
          num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, num_experts=7, num_experts_per_tok=3,
          norm_topk_prob=False, mlp_only_layers=[0], tie_word_embeddings=True),

    _case("qwen3_moe", "norm", 2218, "bfloat16", num_shards=3, quick=True,
          vocab_size=131, hidden_size=40, moe_intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
          num_key_value_heads=2, head_dim=16, num_experts=10, num_experts_per_tok=4, norm_topk_prob=True),
    # Layer 1 is dense.
    _case("qwen3_moe", "mlp_only", 719, "float32",
          vocab_size=97, hidden_size=56, moe_intermediate_size=20, num_hidden_layers=3, num_attention_heads=7,
          num_key_value_heads=1, head_dim=10, num_experts=5, num_experts_per_tok=2, norm_topk_prob=False,
          mlp_only_layers=[1], tie_word_embeddings=True),
    # Layers 0 and 2 are dense by the step, layer 3 by name: only layer 1 routes.
    _case("qwen3_moe", "sparse_step", 620, "float32",
          vocab_size=101, hidden_size=36, moe_intermediate_size=36, num_hidden_layers=4, num_attention_heads=3,
          num_key_value_heads=3, head_dim=8, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
          decoder_sparse_step=2, mlp_only_layers=[3]),

    _case("olmoe", "full_norm", 21, "bfloat16", quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
          num_key_value_heads=4, num_experts=6, num_experts_per_tok=3),
    _case("olmoe", "clip_qkv", 422, "float32", num_shards=2,
          vocab_size=97, hidden_size=48, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
          num_key_value_heads=2, num_experts=5, num_experts_per_tok=2, clip_qkv=0.8),
)
# fmt: on

CASES_BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
QUICK_CASES: tuple[Case, ...] = tuple(case for case in CASES if case.quick)

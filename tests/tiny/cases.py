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

_DEEPSEEK: dict[str, Any] = {
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_SIGMOID: dict[str, Any] = {
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
# The original context ends within the prompts.
_YARN: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "factor": 4.0, "original_max_position_embeddings": 20}

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
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **_DEEPSEEK,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
    "deepseek_v3": {"architectures": ["DeepseekV3ForCausalLM"], **_DEEPSEEK, **_SIGMOID},
    "kimi_k2": {"architectures": ["DeepseekV3ForCausalLM"], **_DEEPSEEK, **_SIGMOID, "num_nextn_predict_layers": 0},
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        **_ROUTER,
        "attention_bias": True,
        "initial_context_length": 32,
        "rope_theta": 150000.0,
        "swiglu_limit": 7.0,
    },
    "llama4_text": {
        "architectures": ["Llama4ForCausalLM"],
        **_ROUTER,
        "attention_bias": False,
        "rope_theta": 500000.0,
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

    # V2: groups of two experts, of which a token visits two; YaRN as DeepSeek has it; a latent for queries too.
    _case("deepseek_v2", "groups", 231, "float32",
          vocab_size=97, hidden_size=48, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=3,
          num_attention_heads=6, num_key_value_heads=6, q_lora_rank=20, kv_lora_rank=18, qk_nope_head_dim=10,
          qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
          topk_method="group_limited_greedy", routed_scaling_factor=1.5,
          rope_scaling={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "type": "yarn"}),
    # V2-Lite: queries without a latent, no groups.
    _case("deepseek_v2", "lite", 132, "bfloat16", quick=True,
          vocab_size=101, hidden_size=36, intermediate_size=44, moe_intermediate_size=12, num_hidden_layers=2,
          num_attention_heads=3, num_key_value_heads=3, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
          qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=5, num_experts_per_tok=2, n_group=1, topk_group=1,
          topk_method="greedy", routed_scaling_factor=1.0, rope_scaling=None),
    # V3: sigmoids, a bias in the choice, groups as good as their two best experts, weights that sum to 2.5.
    _case("deepseek_v3", "groups", 333, "bfloat16", num_shards=3, quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=4,
          num_attention_heads=4, num_key_value_heads=4, q_lora_rank=28, kv_lora_rank=24, qk_nope_head_dim=12,
          qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2,
          routed_scaling_factor=2.5,
          rope_scaling={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}),
    # A head's pairs half a head apart, as published; no mscale; two dense layers.
    _case("deepseek_v3", "halves", 534, "float32",
          vocab_size=97, hidden_size=40, intermediate_size=44, moe_intermediate_size=12, num_hidden_layers=3,
          num_attention_heads=5, num_key_value_heads=5, q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=6,
          qk_rope_head_dim=10, v_head_dim=8, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1,
          routed_scaling_factor=1.0, first_k_dense_replace=2, rope_interleave=False, rope_scaling=None),
    # Kimi-K2: one group, mscale of YaRN.
    _case("kimi_k2", "one_group", 435, "bfloat16", quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=60, moe_intermediate_size=28, num_hidden_layers=2,
          num_attention_heads=6, num_key_value_heads=6, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
          qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=10, num_experts_per_tok=3, n_group=1, topk_group=1,
          routed_scaling_factor=2.827,
          rope_scaling={**_YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}),

    _case("glm4_moe", "norm", 136, "bfloat16", quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=60, moe_intermediate_size=20, num_hidden_layers=3,
          num_attention_heads=6, num_key_value_heads=2, head_dim=12, n_routed_experts=7, num_experts_per_tok=3,
          attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5),
    # As GLM-4.5-Air: no norm of query and key. Two groups.
    _case("glm4_moe", "groups", 237, "float32",
          vocab_size=97, hidden_size=40, intermediate_size=44, moe_intermediate_size=12, num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=1, head_dim=16, n_routed_experts=6, num_experts_per_tok=2,
          attention_bias=False, use_qk_norm=False, routed_scaling_factor=1.0, n_group=2, topk_group=1),

    # A window of 9 in every other layer, sinks, biases, YaRN beyond its original context.
    _case("gpt_oss", "window", 238, "bfloat16", num_shards=2, quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=28, num_hidden_layers=4, num_attention_heads=6,
          num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=3, sliding_window=9,
          layer_types=["sliding_attention", "full_attention"] * 2,
          rope_scaling={**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "rope_type": "yarn", "truncate": False}),
    # Gates that meet the limit; one key/value head; layer types by the default rule.
    _case("gpt_oss", "clamped", 239, "float32",
          vocab_size=97, hidden_size=36, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
          num_key_value_heads=1, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=6,
          swiglu_limit=0.9,
          rope_scaling={**_YARN, "factor": 8.0, "rope_type": "yarn"}),

    # Scout: every layer routes, chunks shorter than the prompts, llama3 scaling without a blend.
    _case("llama4_text", "scout", 40, "bfloat16", quick=True,
          vocab_size=131, hidden_size=48, intermediate_size=28, intermediate_size_mlp=60, num_hidden_layers=4,
          num_attention_heads=6, num_key_value_heads=2, head_dim=8, num_local_experts=6, num_experts_per_tok=1,
          interleave_moe_layer_step=1, attention_chunk_size=11, use_qk_norm=True, floor_scale=16, attn_scale=0.2,
          attn_temperature_tuning=True,
          rope_scaling={"factor": 4.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 40, "rope_type": "llama3"}),
    # Maverick: every other layer dense, no norm of query and key; layers without rotary embedding by name.
    _case("llama4_text", "maverick", 41, "float32",
          vocab_size=97, hidden_size=40, intermediate_size=20, intermediate_size_mlp=44, num_hidden_layers=4,
          num_attention_heads=5, num_key_value_heads=1, head_dim=12, num_local_experts=5, num_experts_per_tok=1,
          interleave_moe_layer_step=2, attention_chunk_size=16, use_qk_norm=False, no_rope_layers=[1, 0, 1, 1],
          attn_temperature_tuning=False),

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

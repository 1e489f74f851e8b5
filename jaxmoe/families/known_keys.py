"""Classification of the config.json keys that no family reads.

A key never matters, is harmless at certain values, or may change the computation.
Sources: Hugging Face's PreTrainedConfig.to_dict and GenerationConfig (transformers 4.27 to 5.24), and the keys that
transformers' shared code (masks, caches, rotary embedding) reads from any config.
"""

from __future__ import annotations

from typing import Any

# Training settings, token ids (set by the tokenizer and generation_config), bookkeeping of the writing library.
_BOOKKEEPING = frozenset({
    "add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids",
    "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "dtype", "embd_pdrop", "eos_token_id", "experts_implementation", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range",
    "internal_version", "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id", "language", "license",
    "max_window_layers", "model_max_length", "model_name", "model_type", "name_or_path", "neftune_noise_alpha",
    "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unk_token_id",
    "use_bfloat16", "use_cache", "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "use_return_dict",
    "use_unpad_attn",
})  # fmt: skip
# Sampling and search settings, which belong in generation_config.json and which older to_dict() wrote here.
_GENERATION = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "begin_suppress_tokens", "cache_config",
    "cache_implementation", "compile_config", "constraints", "diversity_penalty", "do_sample", "dola_layers",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_decoder_ids",
    "forced_eos_token_id", "guidance_scale", "is_assistant", "length_penalty", "low_memory", "max_length",
    "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "return_legacy_cache", "sequence_bias", "stop_strings", "suppress_tokens",
    "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_model_defaults",
    "watermarking_config",
})  # fmt: skip
_PREFIXES = ("_", "unsloth_")  # private keys of the writing library

# Values at which a key describes the default behavior of a family that does not read it.
_USUAL: dict[str, tuple[Any, ...]] = {
    "first_k_dense_replace": (0,), "moe_frequency": (1,), "moe_layer_freq": (1,), "n_group": (1,),
    "n_shared_experts": (0,), "num_nextn_predict_layers": (0,), "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,), "topk_group": (1,), "is_causal": (True,),
}  # fmt: skip
# transformers' masks and caches read these keys for every family, so only null is the same as absent.
_NEVER_OFF = ("attention_chunk_size", "layer_types", "sliding_window")
# Parts of key names that relate to the computation.
_SUSPICIOUS = (
    "act", "atten", "attn", "bias", "cap", "causal", "chunk", "clip", "compress", "dim", "direction", "embed", "expert",
    "ffn", "freq", "gate", "head", "hidden", "kv", "layer", "logit", "mask", "mix", "mlp", "moe", "multipl", "mup",
    "norm", "position", "qk", "quant", "rank", "resid", "rope", "rotary", "rout", "scal", "sigmoid", "size", "softmax",
    "sparse", "theta", "window", "yarn",
)  # fmt: skip


def is_harmless(key: str) -> bool:
    """Return whether a key never changes the computation, at any value."""
    return key in _BOOKKEEPING or key in _GENERATION or key.startswith(_PREFIXES)


def is_usual(key: str, value: Any) -> bool:
    """Return whether a value describes the default behavior of a family that does not read the key.

    The value is off (null, false, an empty list or object), or listed above as having no effect. Other zeros may have a
    meaning.
    """
    if key in _NEVER_OFF:
        return value is None
    off = value is None or value is False or value == [] or value == {}
    return off or any(value == usual and isinstance(value, int) for usual in _USUAL.get(key, ()))


def is_suspicious(key: str) -> bool:
    """Return whether the name of an unknown key suggests that it changes the computation."""
    return key in _NEVER_OFF or any(part in key.lower() for part in _SUSPICIOUS)

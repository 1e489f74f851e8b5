"""List of faults for scripts/mutation_check.py: each is one small, exact replacement in a source file.

Every fault imports and runs; only values change. `tests` names the test files to run first, as the most likely to find
the fault. A fault is stale if its old text does not occur exactly once in its file; it must then be rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = ("routing", "masks", "sharding", "paging", "sampling", "loading", "conversion", "planning")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Describe one replacement of the text `old` by `new` in a file.

    file: path within the repository; `old` occurs in it exactly once. tests: pytest arguments.
    """

    name: str
    group: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _faults(group: str, *rows: tuple[str, str, str, str, str]) -> tuple[Fault, ...]:
    """Return the faults of a group from (name, file, old, new, files below tests/ and perhaps -k EXPRESSION)."""
    found = []
    for name, file, old, new, tests in rows:
        files, _, names = tests.partition(" -k ")
        arguments = tuple(f"tests/{one}" for one in files.split()) + (("-k", names) if names else ())
        found.append(Fault(name=name, group=group, file=file, old=old, new=new, tests=arguments))
    return tuple(found)


ROUTING = _faults(
    "routing",
    (
        "norm-topk-prob-ignored-with-groups",
        "jaxmoe/ops/pointwise/xla.py",
        "    if rule.normalize:\n",
        "    if rule.normalize and rule.num_groups == 1:\n",
        "ops/test_route.py ops/test_pointwise.py integration/test_goldens.py",
    ),
    (
        "group-score-is-its-best-expert-alone",
        "jaxmoe/ops/pointwise/xla.py",
        "jax.lax.top_k(_nan_first(by_group), min(rule.experts_per_group_score, by_group.shape[2]))",
        "jax.lax.top_k(_nan_first(by_group), 1)",
        "ops/test_route.py ops/test_pointwise.py integration/test_goldens.py",
    ),
    (
        "selection-bias-weighs-experts",
        "jaxmoe/ops/pointwise/xla.py",
        "chosen = jnp.take_along_axis(scores, experts, axis=-1)",
        "chosen = jnp.take_along_axis(choice, experts, axis=-1)",
        "ops/test_route.py ops/test_pointwise.py",
    ),
    (
        "native-top-k-ties-to-the-higher-expert",
        "jaxmoe/ops/native/pointwise.cc",
        "return x > y || (x == y && a < b);",
        "return x > y || (x == y && a > b);",
        "ops/test_pointwise.py",
    ),
    (
        "last-block-of-an-expert-takes-a-row-of-the-next",
        "jaxmoe/ops/grouped_matmul/blocks.py",
        "real = row_index < plan.ends[expert]",
        "real = row_index <= plan.ends[expert]",
        "ops/test_grouped_matmul.py",
    ),
)

MASKS = _faults(
    "masks",
    (
        "window-sees-one-token-more",
        "jaxmoe/ops/attention/mask.py",
        "allowed &= distance < self.window",
        "allowed &= distance <= self.window",
        "ops/test_attention.py ops/test_paged_attention.py",
    ),
    (
        "native-window-sees-one-token-more",
        "jaxmoe/ops/native/paged.cc",
        "std::max<int64_t>(0, at - window + 1)",
        "std::max<int64_t>(0, at - window)",
        "ops/test_paged_attention.py integration/test_goldens.py",
    ),
    (
        "chunk-slides-as-a-window",
        "jaxmoe/ops/attention/mask.py",
        "allowed &= query_at // self.chunk == key_at // self.chunk",
        "allowed &= distance < self.chunk",
        "ops/test_attention.py ops/test_paged_attention.py",
    ),
    (
        "native-sink-of-the-first-head-for-its-group",
        "jaxmoe/ops/native/paged.cc",
        "sinks != nullptr ? sinks[head * group + r % group] : row[from]",
        "sinks != nullptr ? sinks[head * group] : row[from]",
        "ops/test_paged_attention.py integration/test_goldens.py",
    ),
    (
        "padding-token-writes-its-key",
        "jaxmoe/model/attend.py",
        "valid = jnp.arange(length) < query_lens[:, None]",
        "valid = jnp.arange(length) <= query_lens[:, None]",
        "engine/test_generate.py engine/test_engine.py",
    ),
)

SHARDING = _faults(
    "sharding",
    (
        "norm-over-all-heads-lacks-its-psum",
        "jaxmoe/model/rows.py",
        "return jax.lax.psum(means, axes) if axes else means",
        "return means",
        "integration/test_goldens.py -k olmoe and turn",
    ),
    (
        "every-rank-adds-the-down-bias",
        "jaxmoe/model/moe.py",
        "return jnp.dot(weights_tE * first, bias_ED.astype(jnp.float32))",
        "return jnp.dot(weights_tE, bias_ED.astype(jnp.float32))",
        "integration/test_goldens.py -k gpt_oss and turn",
    ),
    (
        "hierarchical-exchange-along-the-inner-axis-first",
        "jaxmoe/ops/dispatch/spec.py",
        "outer = next(axis for axis in self.axes if sizes[axis] > 1)",
        "outer = next(axis for axis in reversed(self.axes) if sizes[axis] > 1)",
        "ops/test_dispatch.py",
    ),
    (
        "uneven-experts-padded-at-the-wrong-end",
        "jaxmoe/model/moe.py",
        "((0, 0), (0, share * ranks * others - moe.num_experts))",
        "((0, 0), (share * ranks * others - moe.num_experts, 0))",
        "integration/test_goldens.py -k kimi and turn",
    ),
    (
        "interleaved-stage-files-its-micro-batch-one-late",
        "jaxmoe/model/pipeline.py",
        "back = schedule.slot(tick - 1, schedule.stages - 1, decode_steps).micro_batch",
        "back = schedule.slot(tick, schedule.stages - 1, decode_steps).micro_batch",
        "model/test_pipeline.py",
    ),
)

PAGING = _faults(
    "paging",
    (
        "page-freed-with-one-holder-left",
        "jaxmoe/cache/pages.py",
        "        if self._ref_counts[page]:\n            return\n        if page in self._cached:",
        "        if self._ref_counts[page] > 1:\n            return\n        if page in self._cached:",
        "cache engine/test_scheduler.py",
    ),
    (
        "prefix-known-without-its-parent",
        "jaxmoe/cache/pages.py",
        "return self._cached[pages[start - 1]]",
        "return self._root",
        "cache engine/test_scheduler.py",
    ),
    (
        "page-loop-ends-before-a-chunk-that-crosses-a-group",
        "jaxmoe/ops/paged_attention/loop.py",
        "(positions + query_lens + whole - 1) // whole",
        "(positions + whole) // whole",
        "ops/test_paged_attention.py",
    ),
    (
        "values-come-back-from-the-host-as-keys",
        "jaxmoe/engine/transfer.py",
        "values = new[which // num_vectors][0, layer : layer + len(array), which % num_vectors]",
        "values = new[which // num_vectors][0, layer : layer + len(array), 0]",
        "engine/test_transfer.py",
    ),
    (
        "page-released-last-is-evicted-first",
        "jaxmoe/cache/pages.py",
        "page = next(page for page in self._evictable if self._cached[page].is_last())",
        "page = next(page for page in reversed(self._evictable) if self._cached[page].is_last())",
        "cache engine/test_scheduler.py",
    ),
)

SAMPLING = _faults(
    "sampling",
    (
        "presence-and-frequency-count-the-prompt",
        "jaxmoe/ops/sampling/xla.py",
        "answered = counted(known & (place >= rows.prompt_length[:, None]))",
        "answered = counted(known)",
        "ops/test_sampling.py -k penalties",
    ),
    (
        "native-first-answered-token-is-not-counted",
        "jaxmoe/ops/native/sample.cc",
        "if (place >= prompt_length[row]) ++answered[token];",
        "if (place > prompt_length[row]) ++answered[token];",
        "ops/test_sampling.py -k both_kinds",
    ),
    (
        "top-p-leaves-out-the-token-that-reaches-it",
        "jaxmoe/ops/sampling/xla.py",
        "before = jnp.cumsum(share, axis=-1) - share",
        "before = jnp.cumsum(share, axis=-1)",
        "ops/test_sampling.py",
    ),
    (
        "native-repetition-divides-negative-logits",
        "jaxmoe/ops/native/sample.cc",
        "out[token] = out[token] > 0 ? out[token] / repetition[row] : out[token] * repetition[row];",
        "out[token] = out[token] / repetition[row];",
        "ops/test_sampling.py -k repeated_token",
    ),
    (
        "logprobs-are-of-the-penalized-logits",
        "jaxmoe/ops/sampling/xla.py",
        "total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)",
        "total = jax.nn.logsumexp(adjusted, axis=-1, keepdims=True)",
        "ops/test_sampling.py -k logprobs",
    ),
)

LOADING = _faults(
    "loading",
    (
        "interleaved-gate-and-up-swapped",
        "jaxmoe/families/keys.py",
        'slice(part, 2 * outputs, 2) if fused == "interleaved"',
        'slice(1 - part, 2 * outputs, 2) if fused == "interleaved"',
        "integration/test_goldens.py -k gpt_oss and turn",
    ),
    (
        "rotary-halves-swapped-where-published-interleaved",
        "jaxmoe/families/attention_keys.py",
        "slice(first + start + part, first + start + dims, 2)",
        "slice(first + start + 1 - part, first + start + dims, 2)",
        "integration/test_goldens.py -k deepseek and turn",
    ),
    (
        "scale-block-counted-from-the-first-row-read",
        "jaxmoe/quantization/tensors.py",
        "scales, self._format, first=start % block)",
        "scales, self._format, first=0)",
        "weights/test_lazy_tensors.py weights/test_load.py",
    ),
    (
        "mxfp4-high-half-first",
        "jaxmoe/quantization/tensors.py",
        "for shift in (0, 4)]",
        "for shift in (4, 0)]",
        "weights/test_lazy_tensors.py engine/test_weights_dtype.py",
    ),
    (
        "only-the-first-copy-of-a-key-head-is-loaded",
        "jaxmoe/config/model.py",
        "return range(kv_head * self.kv_copies, (kv_head + 1) * self.kv_copies)",
        "return range(kv_head * self.kv_copies, kv_head * self.kv_copies + 1)",
        "parallel/test_sharding.py",
    ),
)

CONVERSION = _faults(
    "conversion",
    (
        "manifest-checksum-not-compared",
        "jaxmoe/weights/verify.py",
        "if sum_tensor(tensors[name]) != entry.sha256:",
        "if len(sum_tensor(tensors[name])) != len(entry.sha256):",
        "weights/test_verify.py",
    ),
    (
        "journal-believed-without-reading-again",
        "jaxmoe/weights/stream.py",
        "        if actual != said:\n",
        "        if actual.keys() != said.keys():\n",
        "weights/test_journal.py weights/test_convert.py",
    ),
    (
        "float64-rounded-twice-to-bfloat16",
        "jaxmoe/weights/transform.py",
        "    bits |= near != numbers\n",
        "",
        "weights/test_transform.py",
    ),
    (
        "last-chunk-of-a-line-runs-into-the-next",
        "jaxmoe/weights/store.py",
        "num_bytes = min(stop - start, self.chunk_bytes - first, line_bytes - within)",
        "num_bytes = min(stop - start, self.chunk_bytes - first)",
        "weights/test_store.py",
    ),
    (
        "selection-bias-cast-with-the-rest",
        "jaxmoe/weights/transform.py",
        "tensor.dtype in _PLAIN_FLOATS and not is_exact(tensor.name)",
        "tensor.dtype in _PLAIN_FLOATS",
        "weights/test_transform.py weights/test_convert.py",
    ),
)

PLANNING = _faults(
    "planning",
    (
        "all-reduce-counted-once-a-layer",
        "jaxmoe/parallel/collectives.py",
        '        self.sum(placement, "ffn", self.shared_rows * self.hidden, count)\n',
        '        self.sum(placement, "ffn", self.shared_rows * self.hidden, 0)\n',
        "aot/test_contract.py",
    ),
    (
        "cached-tokens-without-their-scales",
        "jaxmoe/planner/memory.py",
        "return slots * self.config.cache_spec(block.layer).bytes_per_head(item, scale)",
        "return slots * self.config.cache_spec(block.layer).bytes_per_head(item, 0)",
        "planner/test_parameters.py",
    ),
    (
        "bubble-ignores-interleaved-chunks",
        "jaxmoe/planner/cost.py",
        "waits = (stages - 1) / (stages * virtual_stages * (1 if batch.prefill else MAX_DECODE_STEPS))",
        "waits = (stages - 1) / (stages * (1 if batch.prefill else MAX_DECODE_STEPS))",
        "planner/test_cost.py",
    ),
    (
        "all-reduce-sends-its-message-once",
        "jaxmoe/parallel/collectives.py",
        'return (2 if op == "all-reduce" else 1) * whole_bytes * (num_ranks - 1) / num_ranks',
        "return whole_bytes * (num_ranks - 1) / num_ranks",
        "planner/test_links.py",
    ),
    (
        "active-parameters-lack-an-expert",
        "jaxmoe/planner/sizes.py",
        "moe.num_experts * (moe.num_experts - moe.num_experts_per_tok)",
        "moe.num_experts * (moe.num_experts - moe.num_experts_per_tok + 1)",
        "planner/test_sizes.py",
    ),
)

FAULTS: tuple[Fault, ...] = (
    *ROUTING, *MASKS, *SHARDING, *PAGING, *SAMPLING, *LOADING, *CONVERSION, *PLANNING,
)  # fmt: skip

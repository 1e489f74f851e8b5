"""Every backend in the registry computes what the reference of its op defines, in float32 and in bfloat16.

A kernel function without a case here fails test_every_kernel_has_a_case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.config import SwiGLUClamp
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.ops.attention import MaskSpec, causal_attention
from jaxmoe.ops.attention import reference as attention_reference
from jaxmoe.ops.dispatch import DispatchSpec, combine, dispatch
from jaxmoe.ops.dispatch import reference as dispatch_reference
from jaxmoe.ops.grouped_matmul import grouped_swiglu
from jaxmoe.ops.grouped_matmul import reference as grouped_reference
from jaxmoe.ops.linear import linear
from jaxmoe.ops.linear import reference as linear_reference
from jaxmoe.ops.paged_attention import paged_attention, write_pages
from jaxmoe.ops.paged_attention import reference as paged_reference
from jaxmoe.ops.pointwise import (
    RouteRule,
    gated_rows,
    gated_unit,
    rms_norm,
    rotate,
    route,
    scale_by_rms,
    sum_of_squares,
)
from jaxmoe.ops.pointwise import reference as pointwise_reference
from jaxmoe.ops.registry import REGISTRY
from jaxmoe.ops.sampling import SamplingFeatures, sample
from jaxmoe.ops.sampling import reference as sampling_reference

from ..conftest import mesh_of
from .stacks import LAYER, stacked
from .test_paged_attention import SINKS, pool_of
from .test_quantized_matmul import random as random_quantized
from .test_sampling import rows as sampling_rows

DTYPES = ("float32", "bfloat16")
# Of numbers of a result's dtype, relative to each number and to the largest one.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


class ParityCase(NamedTuple):
    """Arguments of an op and of its reference. quantized: the format of weights among them, if they are quantized."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    arrays: tuple[Any, ...]
    quantized: str | None = None


def numbers(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), dtype)


def matmul(dtype: str, *, transposed: bool = False, result: str | None = None) -> ParityCase:
    x, w = numbers(0, 9, 40, dtype=dtype), numbers(1, *((70, 40) if transposed else (40, 70)), dtype=dtype)
    how = dict(transposed=transposed, dtype=result)
    return ParityCase(partial(linear, **how), partial(linear_reference.linear, **how), (x, stacked(w), LAYER))


def quantized_matmul(dtype: str) -> ParityCase:
    w, _ = random_quantized("int8", (3, 64, 256), (16, 128))
    return ParityCase(linear, linear_reference.linear, (numbers(0, 9, 64, dtype=dtype), w, LAYER), "int8")


def experts(dtype: str, *, num_tokens: int, biases: bool = False, quantized: bool = False) -> ParityCase:
    """Two of five experts for each token, and none for every third one."""
    rng = np.random.default_rng(0)
    weights = np.zeros((num_tokens, 5), np.float32)
    for token in range(num_tokens):
        if token % 3 != 1:
            weights[token, rng.choice(5, 2, replace=False)] = rng.uniform(0.2, 1, 2)
    shapes = (5, 2, 64, 24), (5, 24, 64)
    if quantized:
        gate_up, down = (random_quantized("int8", (3, *shape), (8, 8))[0] for shape in shapes)
    else:
        gate_up, down = (stacked(0.3 * numbers(seed, *shape, dtype=dtype)) for seed, shape in enumerate(shapes))
    bias = stacked(numbers(2, 5, 2, 24, dtype=dtype)) if biases else None
    how = dict(top_k=2, clamp=SwiGLUClamp(limit=1.5) if biases else None)
    arrays = numbers(3, num_tokens, 64, dtype=dtype), jnp.asarray(weights), gate_up, down, LAYER, bias
    run, reference = partial(grouped_swiglu, **how), partial(grouped_reference.grouped_swiglu, **how)
    return ParityCase(run, reference, arrays, "int8" if quantized else None)


def pages(
    dtype: str,
    *,
    mask_spec: MaskSpec,
    sinks: bool = False,
    cache_dtype: str | None = None,
    value_dim: int | None = None,
) -> ParityCase:
    """The last four tokens of prompts, fewer of some and none of one; unused pages hold NaN."""
    lengths = [13, 4, 70, 6]
    prompts, (k_pages, v_pages), block_table = pool_of(lengths, 4, dtype)
    pool = (stacked(k_pages),) if value_dim is not None else (stacked(k_pages), stacked(v_pages))
    if cache_dtype is not None:
        pool = tuple(jnp.full(part.shape, 1, cache_dtype) for part in pool)
        pool += tuple(jnp.full(part.shape[:-1], jnp.nan) for part in pool)
        for row, (length, (_, *kv)) in enumerate(zip(lengths, prompts, strict=True)):
            at = jnp.arange(length)
            pool = write_pages(pool, kv[: 2 if value_dim is None else 1], block_table[row, at // 4], at % 4, LAYER)
    positions, query_lens = jnp.array([length - 4 for length in lengths]), jnp.array([4, 3, 4, 0])
    q = jnp.stack([prompt[0][length - 4 : length] for prompt, length in zip(prompts, lengths, strict=True)])
    how = dict(mask_spec=mask_spec, value_dim=value_dim)

    def valid(function: Callable[..., Any], *arrays: Any, **options: Any) -> jax.Array:
        mixed = function(*arrays, **how, **options)
        return jnp.where((jnp.arange(4) < query_lens[:, None])[:, :, None, None, None], mixed, 0)

    arrays = (q, pool, block_table, positions, query_lens, LAYER, jnp.asarray(SINKS) if sinks else None)
    return ParityCase(partial(valid, paged_attention), partial(valid, paged_reference.paged_attention), arrays)


def rowwise(function: Callable[..., Any], *shapes: tuple[int, ...], **how: Any) -> Callable[[str], ParityCase]:
    """A case of a row-wise function of arrays of these shapes."""

    def case(dtype: str) -> ParityCase:
        reference = getattr(pointwise_reference, function.__name__)
        arrays = tuple(numbers(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
        return ParityCase(partial(function, **how), partial(reference, **how), arrays)

    return case


def norm_by_squares(dtype: str) -> ParityCase:
    case = rowwise(scale_by_rms, (20, 2, 3, 8), (3, 8), eps=1e-5)(dtype)
    return case._replace(arrays=(*case.arrays, jnp.square(numbers(2, 20, 2, dtype="float32"))))


def rotations(dtype: str, *, half: int) -> ParityCase:
    """Rotation of the first 2 * half of ten numbers."""
    angles = numbers(1, 5, 4, half, dtype="float32")
    arrays = numbers(0, 5, 4, 3, 2, 10, dtype=dtype), jnp.cos(angles), jnp.sin(angles)
    return ParityCase(rotate, pointwise_reference.rotate, arrays)


def routed(dtype: str, *, bias: bool = False, **rule: Any) -> ParityCase:
    """Router logits are float32; those rounded to bfloat16 have ties."""
    logits, valid = numbers(0, 40, 12, dtype=dtype).astype("float32"), jnp.arange(40) % 5 > 0
    arrays = logits, valid, numbers(1, 12, dtype="float32") if bias else None
    how = dict(rule=RouteRule(**rule))
    return ParityCase(partial(route, **how), partial(pointwise_reference.route, **how), arrays)


def sampled(dtype: str, *, features: tuple[bool, bool, bool, bool]) -> ParityCase:
    """Rows of six kinds of parameters over 50 tokens, each with its own seed. features: random, adjusted,
    top, masked."""
    kinds = [(0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.3, 7, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2)]
    kinds += [(0.9, 9, 0.8, 0.05)]
    repeated, past, rng = 12, 2**31 - 1, np.random.default_rng(1)
    count = repeated * len(kinds)
    parts = dict(
        repetition=[1, 1.3, 0.5, 1, 1.2, 1], presence=[0, 1.1, 0, -0.7, 0, 0.5], frequency=[0, 0.4, 0, 0, 0.2, 0],
        prompt_length=[2, 3, 0, 4, 2, 2], bias_token_ids=[[0, past, past]] * 3 + [[49, 0, past]] * 3,
        num_stop_ids=[1, 0, 1, 2, 0, 1], min_tokens_until=[9, 9, 3, 3, 9, 9], seed_high=[0, 0, 1, 0, 2**31, 0],
    )  # fmt: skip
    bitmask = rng.integers(-(2**31), 2**31, (count, 2)).astype(np.int32)
    rows = sampling_rows(
        *((*kind, seed) for seed, kind in enumerate(kinds * repeated)), bias=rng.normal(0, 3, (count, 3)),
        token_bitmask=bitmask,
        **{name: part * repeated for name, part in parts.items()},
    )  # fmt: skip
    token_pages = jnp.asarray(rng.integers(0, 50, (2 * count, 4)), jnp.int32)
    block_table = jnp.asarray(rng.permutation(2 * count).reshape(count, 2), jnp.int32)
    logits, positions = 2 * numbers(0, count, 50, dtype=dtype), jnp.arange(count, dtype=jnp.int32) % 9
    arrays = logits, rows, token_pages, block_table, positions, SamplingFeatures(*map(jnp.bool_, features))
    return ParityCase(sample, sampling_reference.sample, arrays)


_AXES = ("expert", "tensor")


def exchanged(dtype: str, *, there_and_back: bool) -> ParityCase:
    """Three tokens on each of four ranks with two experts each.

    there_and_back: each expert multiplies by its number, and results are combined. Otherwise the result on each rank is
    a sum over the tokens it received, in any order.
    """
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (12, 8)) * (rng.uniform(0, 1, (12, 8)) < 0.3)
    arrays = numbers(1, 12, 5, dtype=dtype), jnp.asarray(weights, dtype), jnp.arange(1, 9, dtype=dtype)

    def layer(dispatch, combine, *arrays, backend="all_to_all"):
        exchange = DispatchSpec(axes=_AXES, num_ranks=4, max_ranks=4, backend=backend, platform="cpu")

        @partial(jax.shard_map, mesh=mesh_of("expert=2,tensor=2"), in_specs=(P(_AXES),) * 3, out_specs=P(_AXES),
                 check_vma=False)  # fmt: skip
        def on_rank(x, weights, factors):
            everyone, own, sent = dispatch(x, weights, exchange)
            if there_and_back:
                return combine(everyone * (own @ factors)[:, None], sent, exchange)
            return jnp.einsum("td,te->ed", everyone, own, preferred_element_type=jnp.float32)

        return on_rank(*arrays)

    reference = partial(layer, dispatch_reference.dispatch, dispatch_reference.combine)
    return ParityCase(partial(layer, dispatch, combine), reference, arrays)


MASK_SPECS = {
    "full": MaskSpec(scale=0.4),
    "window": MaskSpec(scale=0.4, window=6),
    "chunk": MaskSpec(scale=0.4, chunk=7),
}
GROUPS = dict(normalize=True, num_groups=4, top_groups=2, experts_per_group_score=2)
# By option of KernelConfig and function of its kernels: cases by name.
CASES: dict[tuple[str, str], dict[str, Callable[[str], ParityCase]]] = {
    ("dispatch", "dispatch"): {"there": partial(exchanged, there_and_back=False)},
    ("dispatch", "combine"): {"there_and_back": partial(exchanged, there_and_back=True)},
    ("grouped", "grouped_swiglu"): {
        "few_tokens": partial(experts, num_tokens=1),
        "many_tokens": partial(experts, num_tokens=100),
        "biases_and_clamp": partial(experts, num_tokens=12, biases=True),
        "quantized": partial(experts, num_tokens=12, quantized=True),
    },
    ("linear", "linear"): {
        "plain": matmul,
        "transposed": partial(matmul, transposed=True),
        "float32_result": partial(matmul, result="float32"),
        "quantized": quantized_matmul,
    },
    ("attention", "paged_attention"): {
        **{name: partial(pages, mask_spec=mask_spec) for name, mask_spec in MASK_SPECS.items()},
        "sinks": partial(pages, mask_spec=MASK_SPECS["window"], sinks=True),
        "int8": partial(pages, mask_spec=MASK_SPECS["full"], cache_dtype="int8"),
        "latent_float8": partial(pages, mask_spec=MASK_SPECS["full"], cache_dtype="float8_e4m3fn", value_dim=5),
    },
    ("pointwise", "rms_norm"): {"plain": rowwise(rms_norm, (40, 33), (33,), eps=1e-5)},
    ("pointwise", "sum_of_squares"): {"plain": rowwise(sum_of_squares, (20, 2, 3, 8))},
    ("pointwise", "scale_by_rms"): {"plain": norm_by_squares},
    ("pointwise", "rotate"): {"whole": partial(rotations, half=5), "part": partial(rotations, half=3)},
    ("pointwise", "gated_unit"): {"plain": rowwise(gated_unit, (40, 33), (40, 33))},
    ("pointwise", "gated_rows"): {"plain": rowwise(gated_rows, (40, 33), (40, 1))},
    ("pointwise", "route"): {
        "softmax": partial(routed, top_k=3, normalize=True),
        "logits": partial(routed, top_k=2, normalize=False, scoring="sigmoid", top_k_of="logits"),
        "groups": partial(routed, bias=True, top_k=3, scoring="sigmoid", scaling=2.5, **GROUPS),
    },
    ("sampling", "sample"): {
        "all_features": partial(sampled, features=(True, True, True, True)),
        "no_features": partial(sampled, features=(False, False, False, False)),
    },
}


def assert_agrees(found: Any, wanted: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if jnp.issubdtype(other.dtype, jnp.integer):
            np.testing.assert_array_equal(one, other)
            continue
        tolerance, other = TOLERANCE[other.dtype.name], np.asarray(other, np.float64)
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=tolerance, atol=tolerance * np.abs(other).max()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "backend", "function", "case"),
    [
        (op, backend, function, case)
        for op, backends in REGISTRY.items()
        for backend, entry in backends.items()
        for function in entry.kernels
        for case in CASES.get((op, function), {})
    ],
)
def test_a_backend_is_its_reference(op, backend, function, case, dtype):
    entry, (run, reference, arrays, quantized) = REGISTRY[op][backend], CASES[op, function][case](dtype)
    reason = entry.unsupported_reason(dtype=dtype, quantized=quantized)
    if reason is not None:
        pytest.skip(reason)
    entry.prepare(dtype)
    assert_agrees(jax.jit(partial(run, backend=backend))(*arrays), jax.jit(reference)(*arrays))


@pytest.mark.parametrize("op", REGISTRY)
def test_every_kernel_has_a_case(op):
    functions = {function for of_op, function in CASES if of_op == op}
    assert {name: set(entry.kernels) for name, entry in REGISTRY[op].items()} == dict.fromkeys(REGISTRY[op], functions)
    assert get_args(get_type_hints(KernelConfig)[op]) == tuple(REGISTRY[op])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask_spec", MASK_SPECS.values(), ids=MASK_SPECS)
def test_attention_within_prompts_is_its_reference(mask_spec, sinks, dtype):
    arrays = [numbers(seed, 2, 18, 2, *dims, dtype=dtype) for seed, dims in enumerate(((3, 8), (8,), (5,)))]
    arrays += [jnp.asarray(SINKS) if sinks else None]
    found = jax.jit(partial(causal_attention, mask_spec=mask_spec, query_block=7))(*arrays)
    assert_agrees(found, jax.jit(partial(attention_reference.causal_attention, mask_spec=mask_spec))(*arrays))

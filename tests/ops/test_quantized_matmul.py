"""Products with quantized matrices are those with the values that the formats define, and need room for a tile only."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.ops.grouped_matmul import grouped_swiglu
from jaxmoe.ops.linear import linear
from jaxmoe.ops.quantized_matmul import QuantizedArray, dequantized, tiles

FORMS = {"int8": "int8", "fp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn"}


def random(
    form: str, shape: tuple[int, ...], blocks: tuple[int, int], seed: int = 0
) -> tuple[QuantizedArray, np.ndarray]:
    """Matrices [..., K, N] with blocks (inputs, outputs), and their values from ml_dtypes' definitions."""
    rng = np.random.default_rng(seed)
    *lead, rows, columns = shape
    scale_shape = (*lead, rows // blocks[0], columns // blocks[1])
    bits = rng.integers(0, 16 if form == "mxfp4" else 256, shape, dtype=np.uint8)
    bits = np.where(bits & 0x7F == 0x7F, 0, bits) if form == "fp8" else bits
    numbers = bits.view(FORMS[form]).astype(np.float32)
    if form == "mxfp4":
        scales = rng.integers(115, 130, scale_shape, dtype=np.uint8)
        factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        stored = bits[..., 0::2, :] | bits[..., 1::2, :] << 4
    else:
        scales = factors = rng.uniform(0.5, 2, scale_shape).astype(np.float32) / 100
        stored = bits.view(np.int8) if form == "int8" else bits
    value = numbers * np.repeat(np.repeat(factors, blocks[0], axis=-2), blocks[1], axis=-1)
    return QuantizedArray(jnp.asarray(stored), jnp.asarray(scales)), value


BLOCKS = [("int8", (96, 1)), ("int8", (16, 4)), ("fp8", (96, 1)), ("fp8", (32, 128)), ("mxfp4", (32, 1))]


@pytest.mark.parametrize(("form", "blocks"), BLOCKS)
def test_values_are_those_of_the_definition_bit_by_bit(form, blocks):
    w, value = random(form, (3, 96, 256), blocks)
    np.testing.assert_array_equal(jax.jit(partial(dequantized, dtype=jnp.float32))(w), value)


def test_every_byte_of_fp8_is_its_number():
    bits = np.arange(256, dtype=np.uint8)
    w = QuantizedArray(jnp.asarray(bits)[None, :], jnp.ones((1, 256), jnp.float32))
    found = np.asarray(dequantized(w, jnp.float32))[0]
    np.testing.assert_array_equal(found, bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.isnan(found).sum() == 2


@pytest.mark.parametrize("tile_bytes", [1, 1 << 20])
@pytest.mark.parametrize(("form", "blocks"), BLOCKS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (5, 640)])
def test_products_are_those_with_the_values(rows, columns, form, blocks, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE_BYTES", tile_bytes)
    w, value = random(form, (3, 96, columns), blocks)
    x = np.random.default_rng(1).normal(size=(rows, 96)).astype(np.float32)
    for backend in ("xla", "native"):
        found = jax.jit(partial(linear, backend=backend))(x, w, 1)
        wanted = x.astype(np.float64) @ value[1]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    half = jax.jit(linear)(jnp.asarray(x, "bfloat16"), w, 1)
    exact = np.asarray(jnp.asarray(x, "bfloat16"), np.float64) @ value[1]
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(half, np.float64) - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize(("form", "blocks"), [("int8", (512, 1)), ("fp8", (128, 128)), ("mxfp4", (32, 1))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_matrix_is_dequantized_whole(form, blocks, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE_BYTES", 1 << 18)
    w, _ = random(form, (4, 512, 2048), blocks)

    def layers(x, w):
        for at in range(4):
            x = jnp.tanh(linear(x, w, at))[:, :512]
        return x

    program = jax.jit(layers).lower(jnp.ones((4, 512), dtype), w).compile()
    one_layer = 512 * 2048 * 4
    assert program.memory_analysis().temp_size_in_bytes < one_layer / 4


@pytest.mark.parametrize("backend", ["blocks", "ragged"])
@pytest.mark.parametrize(("form", "blocks"), [("int8", (16, 16)), ("fp8", (32, 32)), ("mxfp4", (32, 1))])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_experts_are_those_of_the_values(form, blocks, backend, num_tokens, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE_BYTES", 1)
    experts, width, ffn, top_k = 5, 64, 320, 2
    gate_up, gate_up_value = random(form, (2, experts, 2, width, ffn), blocks, 1)
    down, down_value = random(form, (2, experts, ffn, width), blocks, 2)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(num_tokens, width)).astype(np.float32)
    weights = np.zeros((num_tokens, experts), np.float32)
    for token in range(num_tokens):
        weights[token, rng.permutation(experts)[:top_k]] = rng.uniform(0.2, 1, top_k)
    wanted = grouped_swiglu(
        x, weights, jnp.asarray(gate_up_value), jnp.asarray(down_value), 1, top_k=top_k, backend="dense"
    )
    for one in (backend, "dense"):
        found = jax.jit(partial(grouped_swiglu, top_k=top_k, backend=one))(x, weights, gate_up, down, 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())

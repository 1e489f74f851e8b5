"""Which kernels run where nobody chose, and what is said where the fast ones cannot."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.errors import ConfigError
from jaxmoe.model.kernels import KernelConfig, choose_kernels, prepare_kernels
from jaxmoe.ops import native
from jaxmoe.ops.registry import REGISTRY

from ..conftest import NATIVE, mesh_of

UNROLLED = KernelConfig(layers="unroll")


@pytest.fixture
def no_compiler(monkeypatch):
    native._register.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield
    native._register.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_ones_run_where_they_compile(dtype, caplog):
    expected = NATIVE if native.find_compiler() is not None else UNROLLED
    chosen = choose_kernels(dtype, {})
    assert chosen == expected
    assert prepare_kernels(dtype, {}, chosen) == expected
    assert bool(caplog.messages) == (expected != NATIVE)


def test_what_is_named_stays():
    named = {"dispatch": "all_gather", "grouped": "ragged"}
    chosen = choose_kernels("float32", named)
    assert (chosen.dispatch, chosen.grouped) == ("all_gather", "ragged")
    assert chosen.linear == ("native" if native.find_compiler() is not None else "xla")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(("platform", "grouped"), [("tpu", "blocks"), ("gpu", "blocks"), ("cuda", "blocks")])
def test_accelerators_run_xla_and_ask_for_no_compiler(platform, grouped, caplog):
    assert choose_kernels("bfloat16", {}, platform=platform) == KernelConfig(grouped=grouped)
    assert choose_kernels("bfloat16", {"grouped": "dense"}, platform=platform) == KernelConfig(grouped="dense")
    assert not caplog.messages


def test_float16_runs_through_xla():
    assert choose_kernels("float16", {}) == UNROLLED


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_xla_runs_and_a_warning_says_so(caplog):
    assert choose_kernels("bfloat16", {}) == UNROLLED
    assert "C++ compiler" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_what_names_every_step_asks_for_no_compiler(caplog):
    chosen = choose_kernels("bfloat16", vars(KernelConfig()))
    assert prepare_kernels("bfloat16", vars(KernelConfig()), chosen) == chosen == KernelConfig()
    assert not caplog.messages


@pytest.fixture
def broken_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    native._register.cache_clear()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    native._register.cache_clear()


@pytest.mark.usefixtures("broken_compiler")
def test_where_they_do_not_compile_xla_runs_unless_they_were_named(caplog):
    assert prepare_kernels("float32", {}, choose_kernels("float32", {})) == KernelConfig(layers="unroll")
    assert "out of order" in caplog.text
    named = {"linear": "native"}
    with pytest.raises(ConfigError, match="out of order"):
        prepare_kernels("float32", named, choose_kernels("float32", named))


@pytest.mark.usefixtures("broken_compiler")
def test_a_model_loads_without_the_kernels_that_do_not_compile(tiny_dir, caplog):
    steps = []
    load = partial(LLM.load, tiny_dir("llama_mha"), mesh=mesh_of("data=1"), dtype="float32")
    llm = load(on_progress=lambda done, total: steps.append((done, total)))
    assert "out of order" in caplog.text
    assert llm._runner.kernels == KernelConfig(layers="unroll")
    assert steps[-1][0] == steps[-1][1]
    wanted = load(kernels=KernelConfig()).last_logits([[5, 6, 7]])
    np.testing.assert_allclose(llm.last_logits([[5, 6, 7]]), wanted, atol=2e-5)


@pytest.mark.parametrize(("named", "said"), [({"speed": "fast"}, "ops are"), ({"grouped": "best"}, "must be one of")])
def test_unknown_names_are_errors(named, said):
    with pytest.raises(ConfigError, match=said):
        choose_kernels("float32", named)


@pytest.mark.usefixtures("no_compiler")
def test_a_native_one_that_was_named_is_refused_before_anything_is_read():
    choose_kernels("bfloat16", {"dispatch": "all_gather"})
    for choice in ({"linear": "native"}, NATIVE):
        with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
            choose_kernels("bfloat16", choice)


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_the_registry_says_where_a_backend_cannot_run(op, monkeypatch):
    for name, backend in REGISTRY[op].items():
        assert (backend.op, backend.name) == (op, name)
        assert KernelConfig(**{op: name}) is not None
        assert backend.is_opaque == backend.is_native
        if native.find_compiler() is not None:
            assert backend.unsupported_reason(dtype="float32") is None
        assert (backend.unsupported_reason(dtype="float16") is None) == (not backend.is_native)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    reasons = {name: backend.unsupported_reason(dtype="float32") for name, backend in REGISTRY[op].items()}
    assert {name for name, reason in reasons.items() if reason is not None} == {"native"} & set(REGISTRY[op])


def test_the_registry_says_what_a_backend_cannot_read():
    said = REGISTRY["attention"]["native"].unsupported_reason(dtype="float32", page_shards=True)
    assert said == "attention=native reads whole pages, but this layout shards them over context: use loop"
    for op in ("grouped", "linear"):
        said = REGISTRY[op]["native"].unsupported_reason(dtype="float32", quantized="fp8")
        assert said.startswith(f"{op}=native reads plain weights, but this model's weights are fp8")
        for name in set(REGISTRY[op]) - {"native"}:
            assert REGISTRY[op][name].unsupported_reason(dtype="float32", quantized="fp8") is None

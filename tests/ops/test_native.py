"""Compilation of the native kernels: without a working compiler the error says so."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native


def test_loading_it_leaves_small_numbers_alone():
    if native.find_compiler() is not None:
        native.prepare("float32")
    assert np.float32(1e-40) * np.float32(1.0) > 0


def test_mistakes_are_config_errors(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="not float16"):
        native.prepare("float16")
    native._register.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        native.prepare("float32")
    failing = tmp_path / "failing-compiler"
    failing.write_text("#!/bin/sh\necho 'error: no headers' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="error: no headers"):
        native.prepare("float32")
    assert not list((tmp_path / "jaxmoe" / "native").glob("*"))
    native._register.cache_clear()

"""Names of clusters read as they are written, and what is wrong with one is said."""

from __future__ import annotations

import pytest

from jaxmoe.aot.targets import DEVICES, parse_target
from jaxmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "devices"),
    [("v5p:4x4x8", 128), ("tpu7x:4x4x4", 128), ("v5e:16x16", 256), ("h200:2x8", 16), ("b200:1x8", 8), ("v4:1x1x1", 1)],
)
def test_devices_of_a_target(text, devices):
    target = parse_target(text)
    assert target.num_devices == devices
    assert str(target) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h300:1x8", "unknown device 'h300'; known devices are v4"),
        ("h200", "needs 2 sizes, as in h200:2x8"),
        ("h200:8", "needs 2 sizes"),
        ("v5p:4x4", "needs 3 sizes, as in v5p:4x4x4"),
        ("v5e:2x2x2", "needs 2 sizes, as in v5e:4x4"),
        ("v5p:4x0x4", "needs 3 sizes"),
        ("v5p:4x-4x4", "needs 3 sizes"),
        ("", "unknown device ''"),
        ("h200:99999999999x8", "has 799999999992 devices; at most 65536"),
    ],
)
def test_what_is_no_target_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_target(text)


def test_every_gpu_has_the_description_its_compiler_asks_for():
    from jaxmoe.aot import targets

    folder = targets.Path(targets.__file__).parent / "gpus"
    described = {path.stem: path.read_text() for path in folder.glob("*.txtpb")}
    assert described.keys() == {name for name, device in DEVICES.items() if device.platform == "cuda"}
    for name, text in described.items():
        assert f"device_memory_size: {DEVICES[name].hbm_bytes}\n" in text

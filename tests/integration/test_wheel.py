"""The wheel alone, outside the checkout: presets and the embedded model travel in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(build, cwd=ROOT, check=True)
    (path,) = folder.glob("jaxmoe-*.whl")
    return path


def test_the_wheel_is_light_and_whole(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "jaxmoe/_assets/meshes/cpu-8.toml" in names
    assert "jaxmoe/_assets/models/deepseek-v3.json" in names
    assert "jaxmoe/_assets/checkpoints/demo/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 14e6
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in required if "torch" in line or "transformers" in line or "==" in line]


def test_generate_from_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import jaxmoe; from jaxmoe.cli.main import run; "
        f"assert jaxmoe.__file__.startswith({str(site)!r}); "
        f"run(['generate', '--devices', '8', '--mesh', 'cpu-8', '--max-tokens', '8', '--dtype', 'float32', '--json'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 8

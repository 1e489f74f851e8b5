"""Where the data that travels with the package lies: mesh presets and the embedded default checkpoint."""

from __future__ import annotations

from pathlib import Path


def asset_dir(name: str) -> Path:
    """The folder of packaged data called name ("meshes", "models" or "checkpoints"), in a wheel or in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "_assets" / name
    return packaged if packaged.is_dir() else here.parent / name

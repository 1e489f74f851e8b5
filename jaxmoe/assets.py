"""Locations of the data packaged with jaxmoe: mesh presets, model configs and the embedded default checkpoint."""

from __future__ import annotations

from pathlib import Path


def asset_dir(name: str) -> Path:
    """Return the folder of the packaged data `name` ("meshes", "models" or "checkpoints"), in a wheel or a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "_assets" / name
    return packaged if packaged.is_dir() else here.parent / name

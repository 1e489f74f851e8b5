"""Links do not lead out of a checkpoint's directory."""

from __future__ import annotations

import os
from pathlib import Path

from jaxmoe.errors import CheckpointError


def check_symlink(directory: Path, path: Path) -> None:
    """Raise a CheckpointError for a link to nothing, or out of the directory. A hub's snapshot may link to the blobs
    beside it."""
    if not path.is_symlink():
        return
    if not os.path.exists(path):  # nor is a link to itself anything
        raise CheckpointError(f"{path} is a link to nothing ({os.readlink(path)}): fetch it again")
    target, root = path.resolve(), directory.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{path} is a link that leaves the directory, to {target}: put the file itself there if it is meant"
        )

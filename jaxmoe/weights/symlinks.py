"""Checks of symbolic links in a checkpoint's directory."""

from __future__ import annotations

import os
from pathlib import Path

from jaxmoe.errors import CheckpointError


def check_symlink(directory: Path, path: Path) -> None:
    """Raise CheckpointError for a link that is broken or leaves the directory.

    A snapshot in the Hugging Face cache may link to the cache's blobs.
    """
    if not path.is_symlink():
        return
    if not os.path.exists(path):  # includes a link to itself
        raise CheckpointError(f"{path} is a broken link ({os.readlink(path)}): fetch it again")
    target, root = path.resolve(), directory.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{path} is a link that leaves the directory, to {target}: replace it by the file itself if it is needed"
        )

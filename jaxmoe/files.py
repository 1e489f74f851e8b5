"""Write files atomically: a reader sees the old content or the new content, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, check: Callable[[Path], None] | None = None) -> None:
    """Write text or bytes to a file atomically: write a temporary file next to it, then rename it.

    check: called with the temporary file, of the same suffix, before it is renamed; nothing changes if it raises.
    Raises: OSError if the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        partial.chmod(0o644)
        if check is not None:
            check(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

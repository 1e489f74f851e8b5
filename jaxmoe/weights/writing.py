"""Writing more than memory holds: what has been written is sent to the disk at once and takes no room in memory after.

Pages that stay behind in the system's cache must be found, one by one, for each new page; with memory full of them that
took more processor time than all else that a conversion does.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import IO

_DONTCACHE = 0x80  # RWF_DONTCACHE, of Linux 6.14 and later for some file systems (ext4, xfs, btrfs)
_UNCACHED_BYTES = 1 << 20
_CACHED_BYTES = 256 << 10  # with memory full of cached files, a MiB at once takes 3 to 5 times as long


def write_all(file: IO[bytes], part: memoryview) -> None:
    """All of part at the position of an unbuffered file, past the system's cache where that can be."""
    if sys.platform == "linux":
        part = _write_uncached(file, part)
    while len(part):
        part = part[file.write(part[:_CACHED_BYTES]) :]


def _write_uncached(file: IO[bytes], part: memoryview) -> memoryview:
    """What is left of part: all of it where the kernel or the file system cannot."""
    try:
        while len(part):
            part = part[os.pwritev(file.fileno(), [part[:_UNCACHED_BYTES]], -1, _DONTCACHE) :]
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    return part

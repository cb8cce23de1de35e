"""The C library keeps freed memory for the next tensor, where it would give it back to the system after each operator.

Memory that was given back comes in pages that are empty and new: the system clears each, and stops every thread of the
process for a moment. Where nothing else runs that costs little; on a busy machine the threads wait for each other.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed"]

# Of malloc.h: from which size on memory comes from the system by itself, and how much may lie idle at the end.
_TRIM, _MAP = -1, -3
# The largest that the library takes.
_LARGEST_BLOCK = 32 * 2**20
_MOST_IDLE = 2**31 - 1


def keep_freed() -> bool:
    """From now on this process keeps what it frees, up to 2 GiB for each heap; whether its C library could be asked."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MAP, _LARGEST_BLOCK)) and bool(library.mallopt(_TRIM, _MOST_IDLE))

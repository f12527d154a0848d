"""The C library's memory, where it is glibc; another library's is left alone."""

from __future__ import annotations

import ctypes
import functools
import os


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """The C library of this process, None where it is not glibc."""
    try:
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return ctypes.CDLL(None)
    except (AttributeError, OSError, ValueError):  # no confstr, no such name
        pass
    return None


def give_back() -> None:
    """Return freed memory to the system.

    A model that was replaced leaves gaps of all sizes; unasked, glibc gives back only what lies at the end of a heap.
    """
    if library := glibc():
        library.malloc_trim(0)

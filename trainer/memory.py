"""Have the C library keep the memory of activations from one step to the next."""

from __future__ import annotations

from serving.memory import glibc

# The options of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = (1 << 31) - 1  # the largest int: never give memory back
_GROW_BYTES = 64 << 20
_LARGEST_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to hold on to freed memory, in the whole process; returns whether it was told.

    By default glibc takes every large block from the kernel and gives it back when it is freed. The activations of a
    step are such blocks, so each step touches fresh pages, and the kernel clears each of them: a third of the time of
    training on a CPU. Kept, they are mapped once. Other C libraries do otherwise and are left alone.
    """
    library = glibc()
    if library is None:
        return False
    settings = {_M_MMAP_THRESHOLD: _LARGEST_BYTES, _M_TRIM_THRESHOLD: _KEEP_BYTES, _M_TOP_PAD: _GROW_BYTES}
    taken = [library.mallopt(option, value) == 1 for option, value in settings.items()]
    return all(taken)

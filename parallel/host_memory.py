"""The process's own memory on CPU: what a step gives back is kept for the next one."""

from __future__ import annotations

import ctypes
import sys

import jax

# mallopt's parameters, from glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep_host_memory() -> bool:
    """Lets malloc keep freed memory instead of returning it to the system; says whether it does.

    A step on CPU allocates its temporaries and outputs anew. By default glibc maps large blocks
    each time, and the system clears them page by page when they are first touched, which takes
    longer than most elementwise operations themselves. Kept in one heap they are touched once.
    For CPU devices and glibc; elsewhere nothing is done.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26), (ARENA_MAX, 1))
    accepted = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(accepted)

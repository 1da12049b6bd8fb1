"""Pages of 2 MiB for large blocks of host memory: a CPU step is slow to clear small ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program again with huge pages, where they may be asked for; call it first.

    A step on CPU takes its temporaries anew from the system, which clears them page by page as they
    are touched: with pages of 4 KiB that takes longer than most elementwise operations themselves.
    glibc asks for huge ones only if its tunable is in the environment from the start; nothing else
    about the process changes, its number neither. Does nothing on other systems, where huge pages
    are always or never given, and where GLIBC_TUNABLES sets the tunable already.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not sys.platform.startswith("linux"):
        return
    if not PAGES.exists() or "[madvise]" not in PAGES.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

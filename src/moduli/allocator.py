"""The C library's allocator: keep large blocks instead of returning them to the system.

By default glibc maps every large tensor afresh and unmaps it when it is freed, so that each one
pays for its pages again. Keeping them makes layers with large temporaries, dense ones too, up to
several times faster on CPU, at the price that the process does not give memory back. It changes
the whole process, so the library never does it by itself; the command line does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

log = logging.getLogger(__name__)
OFF = "MODULI_KEEP_MALLOC"
"""Environment variable; 1 leaves the allocator as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_tuned = False


def tune_malloc() -> bool:
    """Keep freed memory in the process. Returns whether that could be set (glibc only)."""
    global _tuned
    if _tuned:
        return True
    if os.environ.get(OFF, "") not in ("", "0"):
        log.info("allocator left as it is (%s is set)", OFF)
        return False
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    _tuned = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    if _tuned:
        log.info("allocator keeps freed memory (M_MMAP_MAX=0); %s=1 leaves it as it is", OFF)
    return _tuned


def malloc_is_tuned() -> bool:
    """Whether `tune_malloc` took effect in this process."""
    return _tuned

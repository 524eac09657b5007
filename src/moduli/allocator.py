"""The C library's allocator: keep large blocks instead of returning them to the system.

By default glibc maps every large tensor afresh and unmaps it when it is freed, so that each one
pays for its pages again. Keeping them makes layers with large temporaries, dense ones too, up to
several times faster on CPU. It changes the whole process, so the library never does it by itself;
the command line does.

Blocks of many sizes leave holes that the next ones do not fit, so that the process would grow
without end. Training and testing ask after each batch whether it has doubled, and then what is free
goes back to the system.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
OFF = "MODULI_KEEP_MALLOC"
"""Environment variable; 1 leaves the allocator as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_STATUS = Path("/proc/self/statm")
_LEAST = 2**30
_tuned = False
_held: int | None = None  # bytes of memory when it was last settled; None right after a trim


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


def give_back() -> None:
    """Return what is free to the system; C libraries other than glibc cannot."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_growth() -> None:
    """Give freed memory back if, after `tune_malloc`, the process holds twice what it did.

    Growth of less than 1 GiB is let be. One batch after memory was given back sets the new measure,
    so what every batch needs is kept.
    """
    global _held
    if not _tuned:
        return
    try:
        now = int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc
        return
    if _held is None:
        _held = now
    elif now > 2 * _held and now - _held > _LEAST:
        give_back()
        _held = None


def malloc_is_tuned() -> bool:
    """Whether `tune_malloc` took effect in this process."""
    return _tuned

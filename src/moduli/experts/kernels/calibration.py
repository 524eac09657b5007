"""What was measured on this machine, in one small file of the cache.

It depends on the processor, PyTorch and the C++ kernel, which are in its name; several processes
may measure at the same time, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from moduli.cache import cache_dir
from moduli.experts.kernels.build import SOURCE, library, machine

log = logging.getLogger(__name__)


def calibration_file() -> Path:
    """Where the measurements of this machine are kept."""
    built = "" if isinstance(library(), str) else SOURCE.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join((machine(), torch.__version__, built)).encode()).hexdigest()
    return cache_dir() / "machine" / f"calibration-{key[:16]}.json"


def read_calibration() -> dict[str, Any]:
    """Everything measured so far; empty if nothing readable is there."""
    try:
        known: dict[str, Any] = json.loads(calibration_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def clock() -> float:
    """Seconds, of this process where one thread works, so that other processes do not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measured_once(section: str, names: tuple[str, ...], measure: Callable[[str], Any]) -> Any:
    """`{name: measure(name)}` for all names, from the file where they are in it.

    Args:
        section: what is measured, for example a dtype and a number of threads.
        names: entries of the section.
        measure: called for those that nobody measured before.
    """
    path = calibration_file()
    found = read_calibration().get(section, {})
    if all(name in found for name in names):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    # What is measured may itself ask for something to be measured: `loop` for the fast library.
    with FileLock(f"{path}.lock", is_singleton=True):
        found = read_calibration().get(section, {})
        missing = [name for name in names if name not in found]
        if missing:
            started = time.perf_counter()
            found = found | {name: measure(name) for name in missing}
            known = read_calibration() | {section: found}
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
            os.replace(partial, path)
            seconds = time.perf_counter() - started
            log.info("measured %s (%s), once: %.1f s", section, ", ".join(missing), seconds)
    return found

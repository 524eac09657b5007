"""Fast float32 products on CPUs where that costs no accuracy.

PyTorch sends float32 products to one library (MKL) unless reduced precision is allowed, in which
case another (oneDNN) gets them. On a CPU without reduced-precision float32 the other one computes
plain float32 too and may be more than twice as fast; on a CPU that has it (AMX) it really rounds.
So a probe decides once, and the setting is only on around our own products.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from moduli.experts.kernels.calibration import clock, measured_once

MAX_ERROR = 1e-5  # of a product over 1024 terms, relative to float64
MIN_GAIN = 1.2


@contextmanager
def fast_fp32(on: bool | None = None) -> Iterator[None]:
    """Allow the fast library inside the block.

    Args:
        on: whether to; None asks `fp32_is_safe`.
    """
    if not (fp32_is_safe() if on is None else on):
        yield
        return
    # The setting is the process's own, and several threads may be inside at the same time: the
    # first one in remembers what it was, the last one out restores it.
    global _inside, _before
    with _LOCK:
        if _inside == 0:
            _before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                torch.set_float32_matmul_precision(_before)


_LOCK = threading.Lock()
_inside, _before = 0, "highest"


@lru_cache(maxsize=1)
def fp32_is_safe() -> bool:
    """Whether the fast library is as accurate as float32 should be here, and faster."""
    error, gain = measured_precision()
    return error < MAX_ERROR and gain > MIN_GAIN


def measured_precision() -> tuple[float, float]:
    """Relative error of the fast library over 1024 terms, and its speed relative to the other;
    measured once on this machine."""
    section = f"fast float32, {torch.get_num_threads()} threads"
    error, gain = measured_once(section, ("error and gain",), lambda _: _probe())["error and gain"]
    return float(error), float(gain)


def _probe() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 1024, generator=generator)
    b = torch.randn(1024, 256, generator=generator)
    exact = a.double() @ b.double()
    times = {}
    product = a @ b
    for on in (False, True):
        with fast_fp32(on):
            product = a @ b  # the first call builds what the library needs
            best = float("inf")
            for _ in range(9):
                started = clock()
                product = a @ b
                best = min(best, clock() - started)
        times[on] = best
    error = float((product.double() - exact).norm() / exact.norm())
    return error, times[False] / times[True]

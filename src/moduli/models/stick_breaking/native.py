"""The step of `tiles` in C++: one pass over a tile instead of several; `scan.cpp` says how."""

from __future__ import annotations

from ctypes import CDLL, POINTER, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from moduli.experts.kernels.build import compiled

SOURCE = Path(__file__).with_name("scan.cpp")


def usable(logits: Tensor) -> bool:
    """Whether C++ takes this tile: float32 on the CPU, where a compiler was found."""
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and library() is not None


@lru_cache(maxsize=1)
def library() -> CDLL | None:
    """The compiled step, if there is one."""
    found = compiled(SOURCE, "stick")
    if isinstance(found, str):
        return None
    sizes = (c_int64, c_int64, c_int64, c_int)
    found.moduli_stick_spend.argtypes = (c_void_p, c_void_p, *sizes)
    found.moduli_stick_differentiate.argtypes = (c_void_p,) * 4 + sizes
    found.moduli_stick_decode.argtypes = (
        *(c_void_p,) * 6, POINTER(c_int64), c_float, c_float, c_int, c_int,
    )  # fmt: skip
    return found


def spend(logits: Tensor, left: Tensor) -> None:
    """As `tiles.spend`."""
    _call("moduli_stick_spend", logits, left)


def differentiate(logits: Tensor, slope: Tensor, left: Tensor, before: Tensor) -> None:
    """As `tiles.differentiate`."""
    _call("moduli_stick_differentiate", logits, slope, left, before)


def _call(name: str, *tensors: Tensor) -> None:
    found = library()
    assert found is not None  # `usable` was asked
    assert all(t.is_contiguous() for t in tensors)
    pointers = (t.data_ptr() for t in tensors)
    getattr(found, name)(*pointers, *tensors[0].shape, torch.get_num_threads())

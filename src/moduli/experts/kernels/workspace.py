"""Buffers that kernels use again and again, so that a call does not pay for fresh pages.

One growing buffer per thread, device, dtype and purpose. Nothing in them outlives the kernel that
took them: what autograd saves is allocated afresh.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_LOCAL = threading.local()


def take(purpose: str, *shape: int, like: Tensor) -> Tensor:
    """An uninitialised tensor [*shape] with the dtype and device of `like`.

    The next call with the same purpose, in the same thread, may return the same memory.
    """
    buffers = _buffers()
    key = (purpose, like.dtype, like.device)
    size = math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffers.pop(key, None)  # before the larger one is asked for
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        buffers[key] = buffer
    return buffer[:size].view(shape)


def held() -> int:
    """Bytes that this thread's buffers hold."""
    return sum(b.numel() * b.element_size() for b in _buffers().values())


def release() -> None:
    """Let go of this thread's buffers."""
    _buffers().clear()


def _buffers() -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] | None
    buffers = getattr(_LOCAL, "buffers", None)
    if buffers is None:
        buffers = _LOCAL.buffers = {}
    return buffers
